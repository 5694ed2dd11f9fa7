"""What the destination has of pages that may be written again, for XBZRLE.

A page has one place, its number modulo the places. As in QEMU a page that was written in this
round or the one before is not driven out: of a range that is larger than the cache and
written over and over, some pages are then found in every round, rather than none in any.

Reference: stream format 2.5; counters as QEMU's ``XBZRLECacheStats``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.pageops.xbzrle_encode import EncodedPages, encode_pages

LIFETIME_ROUNDS = 2
"""A page that was written so few rounds ago keeps its place."""

RECORD_OVERHEAD_BYTES = 3
"""Encoding flag and length of an edit; without the address, as QEMU counts."""

Keys = npt.NDArray[np.int64]
Contents = npt.NDArray[np.uint8]


@dataclass(slots=True)
class XbzrleCounters:
    """What happened so far.

    Attributes:
        pages: Pages that were looked up and found, whatever became of them.
        bytes: Bytes that they took: edits with :data:`RECORD_OVERHEAD_BYTES`, pages that were
            longer as an edit whole, unchanged ones nothing.
        cache_miss: Pages that were not found; sent whole.
        overflow: Pages that were longer as an edit; sent whole.
    """

    pages: int = 0
    bytes: int = 0
    cache_miss: int = 0
    overflow: int = 0


class XbzrleCache:
    """Keeps what the destination has of pages, up to a size.

    Args:
        size_bytes: Memory for pages; at least one page.
        page_size: Bytes of a page.
        page_count: Pages of the guest; the cache is not larger than that.

    Attributes:
        counters: What happened so far.
    """

    def __init__(self, size_bytes: int, page_size: int, page_count: int) -> None:
        self._page_size = page_size
        self._places = max(1, min(size_bytes // page_size, page_count))
        self._tags = np.full(self._places, -1, np.int64)
        self._rounds = np.full(self._places, -LIFETIME_ROUNDS, np.int32)
        self._pages = np.zeros((self._places, page_size), np.uint8)
        self._free = self._places
        self._round = 0
        self.counters = XbzrleCounters()

    @property
    def free_pages(self) -> int:
        """Places that never held a page."""
        return self._free

    def begin_round(self) -> None:
        """The next pass over the guest's memory begins."""
        self._round += 1

    def update(self, keys: Keys, pages: Contents) -> tuple[npt.NDArray[np.bool_], EncodedPages]:
        """Encode what is kept, and keep what is sent now.

        What is sent must be ``pages`` itself, not the guest's memory, which may have changed.

        Args:
            keys: A number for each page that is the same whenever it is sent, shape ``(n,)``;
                each at most once.
            pages: Contents, shape ``(n, page_size)``, a copy of our own.

        Returns:
            Which pages were kept, shape ``(n,)``, and the edits of these, in their order. The
            others, and those without an edit, must be sent whole.
        """
        places = keys % self._places
        is_kept = self._tags[places] == keys
        has_all = bool(is_kept.all())
        kept_places = places if has_all else places[is_kept]
        kept_pages = pages if has_all else pages[is_kept]
        encoded = encode_pages(_rows(self._pages, kept_places), kept_pages)
        self._count(encoded, int((~is_kept).sum()))
        self._rounds[kept_places] = self._round
        if encoded.is_changed.all():
            self._pages[kept_places] = kept_pages
        else:
            changed = kept_places[encoded.is_changed]
            self._pages[changed] = kept_pages[encoded.is_changed]
        if not has_all:
            self._insert(keys[~is_kept], pages[~is_kept], self._round)
        return is_kept, encoded

    def fill(self, keys: Keys, pages: Contents) -> None:
        """Keep pages that are sent whole, where there is room; anything drives them out.

        Args:
            keys: As in :meth:`update`.
            pages: Contents as they are sent, shape ``(n, page_size)``.
        """
        self._insert(keys, pages, -LIFETIME_ROUNDS)

    def set_zero(self, keys: Keys) -> None:
        """The destination has zeros of these pages now."""
        places = keys % self._places
        self._pages[places[self._tags[places] == keys]] = 0

    def _insert(self, keys: Keys, pages: Contents, number: int) -> None:
        """Put pages into places that are free, or whose page was not written of late."""
        places = keys % self._places
        # Of pages that want the same place the first has it.
        taken, first = np.unique(places, return_index=True)
        is_open = self._rounds[taken] + LIFETIME_ROUNDS <= self._round
        taken, first = taken[is_open], first[is_open]
        self._free -= int((self._tags[taken] < 0).sum())
        self._tags[taken] = keys[first]
        self._rounds[taken] = number
        self._pages[taken] = pages[first]

    def _count(self, encoded: EncodedPages, missing: int) -> None:
        counters = self.counters
        edits = int(encoded.is_encoded.sum())
        overflow = int(encoded.is_changed.sum()) - edits
        counters.pages += len(encoded.is_changed)
        counters.cache_miss += missing
        counters.overflow += overflow
        counters.bytes += (
            len(encoded.data) + edits * RECORD_OVERHEAD_BYTES + overflow * self._page_size
        )


def _rows(array: Contents, places: Keys) -> Contents:
    """Some rows; without a copy where they stand one behind the other."""
    count = len(places)
    if count and (count == 1 or bool((np.diff(places) == 1).all())):
        return array[int(places[0]) : int(places[0]) + count]
    return array[places]

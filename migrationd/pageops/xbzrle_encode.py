"""XBZRLE for batches of pages: what changed since they were sent last.

Work goes with what changed: pages are compared as words, only differing words as bytes, and
nothing is done per page.

Reference: stream format 2.5; :mod:`migrationd.pageops.xbzrle` has the encoding and decodes it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_WORD_BYTES = 8
_MERGED_GAP_BYTES = 2
"""Unchanged bytes between two runs that cost no more to repeat than to skip."""

_ONE_BYTE_COUNT = 0x80


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """Edits of a batch of pages.

    Attributes:
        is_changed: Pages that differ from what they were, shape ``(n,)``.
        is_encoded: Those of them that have an edit, shape ``(n,)``; the others would be longer
            as an edit than as a page.
        data: All edits, one behind the other.
        ends: Where each page's edit ends in ``data``, shape ``(n,)``; for a page without one,
            where that of the page before it ends.
    """

    is_changed: npt.NDArray[np.bool_]
    is_encoded: npt.NDArray[np.bool_]
    data: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    def edit(self, index: int) -> bytes:
        """The edit of one page."""
        begin = int(self.ends[index - 1]) if index else 0
        return self.data[begin : int(self.ends[index])].tobytes()


def encode_pages(old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8]) -> EncodedPages:
    """Encode pages as edits of their previous content.

    Args:
        old: What the destination has, shape ``(n, page_size)``, contiguous.
        new: What it shall have; must not change during the call.

    Raises:
        ValueError: The shapes differ, or a page has more bytes than counts can say.
    """
    count, page_size = new.shape
    if old.shape != new.shape or page_size % _WORD_BYTES or page_size >= 1 << 14:
        raise ValueError("pages of one size, a multiple of 8 and below 16 KiB, are expected")
    differing = old.view(np.uint64) != new.view(np.uint64)
    words_per_page = differing.sum(axis=1)
    is_changed = words_per_page > 0
    # Two bytes of counts for a run of a word at least: what is all changed needs no look.
    is_encoded = is_changed & (words_per_page * _WORD_BYTES < page_size)
    differing &= is_encoded[:, None]
    positions = _changed_bytes(old, new, np.flatnonzero(differing))
    page_of, begins, ends = _runs(positions, page_size)
    sizes, skips = _sizes(page_of, begins, ends)
    total = np.bincount(page_of, sizes, count).astype(np.int64)
    is_encoded &= total < page_size
    keep = is_encoded[page_of]
    data = _written(new, page_of[keep], begins[keep], ends[keep], skips[keep], sizes[keep])
    return EncodedPages(is_changed, is_encoded, data, np.cumsum(np.where(is_encoded, total, 0)))


def _changed_bytes(
    old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8], words: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Positions of changed bytes over all pages, ascending."""
    before = old.reshape(-1, _WORD_BYTES)[words]
    after = new.reshape(-1, _WORD_BYTES)[words]
    word, byte = np.nonzero(before != after)
    return words[word] * _WORD_BYTES + byte


def _runs(
    positions: npt.NDArray[np.int64], page_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Page, first byte and end in it of each run of changed bytes."""
    if not len(positions):
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    pages = positions // page_size
    breaks = np.diff(positions) > _MERGED_GAP_BYTES + 1
    breaks |= np.diff(pages) > 0
    firsts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lasts = np.concatenate((firsts[1:] - 1, [len(positions) - 1]))
    page_of = pages[firsts]
    start = page_of * page_size
    return page_of, positions[firsts] - start, positions[lasts] + 1 - start


def _sizes(
    page_of: npt.NDArray[np.int64], begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Encoded bytes of each run with its counts, and the unchanged bytes before it."""
    skips = begins.copy()
    if len(page_of):
        follows = np.flatnonzero(np.diff(page_of) == 0) + 1
        skips[follows] = begins[follows] - ends[follows - 1]
    lengths = ends - begins
    sizes = lengths + 2 + (skips >= _ONE_BYTE_COUNT) + (lengths >= _ONE_BYTE_COUNT)
    return sizes, skips


def _written(
    new: npt.NDArray[np.uint8],
    page_of: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    skips: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    data = np.empty(int(sizes.sum()), np.uint8)
    lengths = ends - begins
    at = np.cumsum(sizes) - sizes
    for counts in (skips, lengths):
        is_long = counts >= _ONE_BYTE_COUNT
        data[at] = np.where(is_long, counts & 0x7F | 0x80, counts)
        data[at[is_long] + 1] = counts[is_long] >> 7
        at = at + 1 + is_long
    # Of all runs together: the n-th byte comes from its run's begin plus its place in the run.
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(page_of * new.shape[1] + begins, lengths) + place
    data[np.repeat(at, lengths) + place] = new.reshape(-1)[source]
    return data

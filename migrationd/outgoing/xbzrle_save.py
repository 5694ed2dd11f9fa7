"""The ``ram`` handler of a live guest with XBZRLE: pages that were sent before go as edits.

The cache holds what was sent, not what the guest has: each page is copied once, and copy and
edit are of the same bytes. A page that was written with what it held already is not sent.

Reference: stream format 2.5. Like QEMU's, the first pass looks nothing up; other than QEMU's
it keeps pages while there is room, so that the second pass has edits already.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.info import XbzrleStats
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.ram_save import EncodingSaver, RamSaver
from migrationd.pageops.xbzrle_cache import XbzrleCache, XbzrleCounters

BATCH_PAGES = 512
"""Pages that are looked up together: 2 MiB of copies stay in the processor's cache."""


class XbzrleSaver(EncodingSaver):
    """Sends RAM with edits; used by the outgoing thread only.

    Args:
        ram: Puts records on the wire.
        blocks: RAM blocks in the order of the block list.
        page_size: Target page size in bytes.
        cache_bytes: Asked before each batch; another size begins with an empty cache.
        stats: Counters of the migration.
    """

    def __init__(
        self,
        ram: RamSaver,
        blocks: Sequence[RamBlock],
        *,
        page_size: int,
        cache_bytes: Callable[[], int],
        stats: OutgoingStats,
    ) -> None:
        super().__init__(ram)
        self._page_size = page_size
        self._wanted_bytes = cache_bytes
        self._stats = stats
        self._first_key: dict[str, int] = {}
        self._page_count = 0
        for block in blocks:
            self._first_key[block.idstr] = self._page_count
            self._page_count += block.page_count
        self._passes = 0
        self._counted = XbzrleCounters()
        self._pass_begin = XbzrleCounters()
        self._pages_looked_at = 0
        self._cache_bytes = 0
        self._cache: XbzrleCache
        self._make_cache()

    def save_all(self) -> None:
        """Send every page of every block once; of a guest that writes nothing none goes twice.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
        """
        self._ram.save_all()

    def begin_parts(self) -> None:
        """Begin a pass."""
        self._passes += 1
        self._cache.begin_round()
        self._pages_looked_at = 0
        self._pass_begin = self._now()
        self._ram.begin_parts()

    def end_parts(self) -> None:
        """End a pass.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
        """
        self._ram.end_parts()
        self._tell(is_end=True)

    def send(self, block: RamBlock, pages: Pages, *, is_zero: bool) -> None:
        """Send pages of a block, as they are now.

        Args:
            block: Block.
            pages: Page numbers, shape ``(n,)``, each at most once.
            is_zero: Whether all of them were found to be zero.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
        """
        if self._wanted_bytes() != self._cache_bytes:
            self._make_cache()
        if is_zero:
            self._cache.set_zero(pages + self._first_key[block.idstr])
            self._ram.send(block, pages, is_zero=True)
            return
        for start in range(0, len(pages), BATCH_PAGES):
            batch = pages[start : start + BATCH_PAGES]
            if self._passes > 1:
                self._send_changes(block, batch)
            elif self._cache.free_pages:
                self._send_and_keep(block, batch)
            else:
                self._ram.send(block, pages[start:], is_zero=False)
                return

    def _send_and_keep(self, block: RamBlock, pages: Pages) -> None:
        contents = self._copy(block, pages)
        self._cache.fill(pages + self._first_key[block.idstr], contents)
        copied = contents.reshape(-1), np.arange(len(pages))
        self._ram.send(block, pages, is_zero=False, copied=copied)

    def _send_changes(self, block: RamBlock, pages: Pages) -> None:
        contents = self._copy(block, pages)
        is_kept, encoded = self._cache.update(pages + self._first_key[block.idstr], contents)
        is_whole = ~is_kept
        is_whole[is_kept] = encoded.is_changed & ~encoded.is_encoded
        places = np.flatnonzero(is_whole)
        self._ram.send(block, pages[places], is_zero=False, copied=(contents.reshape(-1), places))
        kept = pages[is_kept]
        sizes = np.diff(encoded.ends, prepend=0)[encoded.is_encoded]
        self._ram.send_edits(block, kept[encoded.is_encoded], encoded.data, sizes)
        self._ram.note_sent(block, kept[~encoded.is_changed])
        self._pages_looked_at += len(pages)
        self._tell(is_end=False)

    def _copy(self, block: RamBlock, pages: Pages) -> npt.NDArray[np.uint8]:
        rows = block.memory.view.reshape(-1, self._page_size)
        first, count = int(pages[0]), len(pages)
        if int(pages[-1]) - first == count - 1:
            return rows[first : first + count].copy()
        return rows[pages]

    def _make_cache(self) -> None:
        """An empty cache of the wanted size; what was counted stays."""
        if self._cache_bytes:
            self._counted = self._now()
        self._cache_bytes = self._wanted_bytes()
        self._cache = XbzrleCache(self._cache_bytes, self._page_size, self._page_count)
        self._tell(is_end=False)

    def _now(self) -> XbzrleCounters:
        before, new = self._counted, self._cache.counters
        return XbzrleCounters(
            pages=before.pages + new.pages,
            bytes=before.bytes + new.bytes,
            cache_miss=before.cache_miss + new.cache_miss,
            overflow=before.overflow + new.overflow,
        )

    def _tell(self, *, is_end: bool) -> None:
        """Show the counters; the rates are those of the last pass that looked something up."""
        shown, now = self._stats.xbzrle, self._now()
        miss_rate = shown.cache_miss_rate if shown is not None else 0.0
        encoding_rate = shown.encoding_rate if shown is not None else 0.0
        if is_end and self._pages_looked_at:
            begin = self._pass_begin
            miss_rate = (now.cache_miss - begin.cache_miss) / self._pages_looked_at
            plain = (now.pages - begin.pages) * self._page_size
            sent = now.bytes - begin.bytes
            encoding_rate = plain / sent if sent else 0.0
        self._stats.xbzrle = XbzrleStats(
            cache_size=self._cache_bytes,
            bytes=now.bytes,
            pages=now.pages,
            cache_miss=now.cache_miss,
            cache_miss_rate=miss_rate,
            encoding_rate=encoding_rate,
            overflow=now.overflow,
        )

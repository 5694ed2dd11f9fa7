"""The ``ram`` handler with pages that are deflated one by one, for QEMU 2.4 to 9.0.

Each page is a zlib stream of its own, so that pages can be deflated, and inflated, on any
number of threads. What does not get smaller goes as it is. The format leaves no batch to work on:
this is the one place that handles pages one at a time, and zlib takes most of that time.

Reference: stream format 2.6. The first page of a block goes plainly, as its name does.
"""

import os
import zlib
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import chain

import numpy as np

from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock
from migrationd.outgoing.ram_save import EncodingSaver, RamSaver

BATCH_PAGES = 1024
SLICE_PAGES = 64
"""Pages that a thread takes at once."""

THREADS_MAX = 8


class CompressSaver(EncodingSaver):
    """Sends RAM deflated; used by the outgoing thread only.

    Args:
        ram: Puts records on the wire.
        blocks: RAM blocks in the order of the block list.
        page_size: Target page size in bytes.
        level: Of zlib, 1 to 9.
    """

    def __init__(
        self, ram: RamSaver, blocks: list[RamBlock], *, page_size: int, level: int
    ) -> None:
        super().__init__(ram)
        self._blocks = blocks
        self._page_size = page_size
        self._level = level
        self._named: RamBlock | None = None

    def save_all(self) -> None:
        """Send every page of every block once.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
        """
        count = min(os.cpu_count() or 1, THREADS_MAX)
        with ThreadPoolExecutor(count, thread_name_prefix="compress") as threads:
            self._ram.begin_parts()
            for block in self._blocks:
                if block.is_elsewhere:
                    continue
                self._ram.send(block, np.flatnonzero(~block.present), is_zero=True)
                self._send(threads, block, np.flatnonzero(block.present))
            self._ram.end_parts()

    def _send(self, threads: Executor, block: RamBlock, pages: Pages) -> None:
        if len(pages) and block is not self._named:
            # A first record names its block, which a deflated page never does.
            self._ram.send(block, pages[:1], is_zero=False)
            self._named, pages = block, pages[1:]
        for start in range(0, len(pages), BATCH_PAGES):
            self._send_batch(threads, block, pages[start : start + BATCH_PAGES])

    def _send_batch(self, threads: Executor, block: RamBlock, pages: Pages) -> None:
        def deflate(part: Pages) -> list[bytes]:
            level = self._level
            return [zlib.compress(page, level) for page in block.memory.read(part)]

        slices = [pages[at : at + SLICE_PAGES] for at in range(0, len(pages), SLICE_PAGES)]
        deflated = list(chain.from_iterable(threads.map(deflate, slices)))
        is_smaller = np.array([len(data) < self._page_size for data in deflated])
        self._ram.send_deflated(
            block,
            pages[is_smaller],
            [data for data in deflated if len(data) < self._page_size],
        )
        self._ram.send(block, pages[~is_smaller], is_zero=False)

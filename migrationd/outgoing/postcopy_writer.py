"""Pages of the postcopy phase onto one channel: the push in short windows, requests between.

A record carries its block's name where the one before it on the channel was of another block,
whoever wrote that one.

Reference: records and CONTINUE, stream format 2.1; pages on the preempt channel, 6.5.
"""

import threading
from collections.abc import Sequence

import numpy as np

from migrationd.codec.constants import (
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_ZERO,
)
from migrationd.codec.header import encode_cstr8
from migrationd.codec.ram_encode import page_headers, zero_records
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.iovec import Vector, address_of, page_vector
from migrationd.outgoing.postcopy_schedule import Batch, Pages, PageSchedule
from migrationd.transport.channel import Channel

ZERO_WINDOW_PAGES = 4096
"""ZERO records of one write, 36 KiB."""

_ZERO_FILL = b"\0"
_LEAD_BYTES = 8 + 1 + 255
_IOVEC_BYTES = 16


class PageWriter:
    """Writes page records to one channel; used by the push and by the request server.

    A request goes before the next window: whoever holds ``_turn`` is next at ``_lock``, and the
    push gives ``_turn`` up while it writes.

    Args:
        channel: Where the records go.
        blocks: RAM blocks.
        schedule: Who sends which page.
        page_size: Target page size in bytes.
    """

    def __init__(
        self, channel: Channel, blocks: Sequence[RamBlock], schedule: PageSchedule, page_size: int
    ) -> None:
        self.channel = channel
        self._blocks = tuple(blocks)
        self._schedule = schedule
        self._page_size = page_size
        self._names = [encode_cstr8(block.idstr) for block in blocks]
        self._contents = [block.memory.view.data for block in blocks]
        self._present = [block.present for block in blocks]
        self._lead = np.zeros(_LEAD_BYTES, np.uint8)
        self._lead_view = self._lead.data
        self._lead_address = address_of(self._lead)
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._is_open = False
        self._last_block = -1
        self._recent: list[_Prepared] = []

    def open(self, lead: bytes) -> None:
        """Write what comes before the first page; pages may follow.

        Raises:
            ChannelClosed: The channel ended.
        """
        with self._turn, self._lock:
            self.channel.send(lead)
            self._is_open = True

    def finish(self, end: bytes) -> None:
        """Write what comes after the last page; requests are dropped from here on.

        Raises:
            ChannelClosed: The channel ended.
        """
        with self._turn, self._lock:
            self._is_open = False
            self.channel.send(end)

    def answer(self, block: int, first: int, count: int) -> tuple[int, int]:
        """Send requested pages, as far as nobody has sent them; waits for at most one window.

        Args:
            block: Index of the block.
            first: First target page.
            count: Target pages, whole host pages.

        Returns:
            Pages and bytes sent.

        Raises:
            ChannelClosed: The channel ended.
        """
        with self._turn, self._lock:
            if not self._is_open:
                return 0, 0
            pages = self._schedule.claim(block, np.arange(first, first + count))
            return len(pages), self._write_pages(block, pages)

    def answer_singles(
        self, requests: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], int]:
        """Send requested single pages in one call, as far as nobody has sent them.

        Args:
            requests: Index of the block and target page of each.

        Returns:
            Those that were sent, and bytes.

        Raises:
            ChannelClosed: The channel ended.
        """
        with self._turn, self._lock:
            if not self._is_open:
                return [], 0
            claim = self._schedule.claim_page
            claimed = [(block, page) for block, page in requests if claim(block, page)]
            parts: list[bytes | memoryview] = []
            for block, page in claimed:
                if self._present[block][page]:
                    start = page * self._page_size
                    parts.append(self._header(RAM_SAVE_FLAG_PAGE, block, page))
                    parts.append(self._contents[block][start : start + self._page_size])
                else:
                    parts.append(self._header(RAM_SAVE_FLAG_ZERO, block, page) + _ZERO_FILL)
            return claimed, self.channel.send_parts(parts) if parts else 0

    def push(self, batch: Batch, window_pages: int) -> tuple[int, int]:
        """Send the next window of a batch.

        Args:
            batch: Pages; what is done of them is noted there.
            window_pages: Most pages of this window.

        Returns:
            Pages that were sent here, and bytes.

        Raises:
            ChannelClosed: The channel ended.
        """
        prepared = self._prepared(batch)
        begin = batch.done
        # A host page is put together at the destination: nothing may come between its parts.
        window_pages = max(window_pages, self._schedule.blocks[batch.block].host_pages)
        pages = batch.pages[begin : begin + window_pages]
        batch.done += len(pages)
        self._turn.acquire()
        self._lock.acquire()
        self._turn.release()
        try:
            if prepared.vector is not None and self._claim_all(batch, pages):
                size = self._write_window(prepared, begin, len(pages))
                return len(pages), size
            claimed = self._schedule.claim(batch.block, pages)
            if prepared.vector is not None and len(claimed) == len(pages):
                size = self._write_window(prepared, begin, len(pages))
            elif not len(claimed):
                size = 0
            elif batch.is_zero:
                size = self._write_zeros(batch.block, claimed)
            else:
                size = self._write_pages(batch.block, claimed)
            return len(claimed), size
        finally:
            self._lock.release()

    def _claim_all(self, batch: Batch, pages: Pages) -> bool:
        """Claim a window as a whole where that is cheap; False where it is not, or too late."""
        count = len(pages)
        first, last = sorted((int(pages[0]), int(pages[-1])))
        is_run = last - first == count - 1
        return batch.is_wanted and is_run and self._schedule.claim_run(batch.block, first, count)

    def _write_window(self, prepared: "_Prepared", begin: int, count: int) -> int:
        assert prepared.vector is not None
        batch = prepared.batch
        header = self._header(RAM_SAVE_FLAG_PAGE, batch.block, int(batch.pages[begin]))
        window = prepared.vector[2 * begin : 2 * (begin + count)]
        if len(header) > 8:
            self._lead_view[: len(header)] = header
            window[0] = self._lead_address, len(header)
        size = len(header) + count * self._page_size + (count - 1) * 8
        address = prepared.address + 2 * begin * _IOVEC_BYTES
        return self.channel.send_window(window, address, size)

    def _prepared(self, batch: Batch) -> "_Prepared":
        """A batch with its vector; that of one that was broken off for a walk is kept."""
        for prepared in self._recent:
            if prepared.batch is batch:
                return prepared
        prepared = self._prepare(batch)
        kept = [one for one in self._recent if one.batch.walk is None and batch.walk is not None]
        self._recent = [*kept, prepared]
        return prepared

    def _prepare(self, batch: Batch) -> "_Prepared":
        """Make the gather vector of a whole batch at once."""
        host_pages = self._schedule.blocks[batch.block].host_pages
        if batch.is_zero or host_pages > 1:
            return _Prepared(batch, None, None)
        headers = page_headers(batch.pages, self._page_size)
        memory = self._blocks[batch.block].memory.view
        return _Prepared(batch, page_vector(headers, memory, batch.pages, self._page_size), headers)

    def _write_some(self, block: int, pages: Pages) -> int:
        """Pages that hold something, without a prepared vector."""
        first = self._blocks[block].memory.read(pages[:1])
        lead = self._header(RAM_SAVE_FLAG_PAGE, block, int(pages[0])) + first.tobytes()
        headers = page_headers(pages[1:], self._page_size)
        memory = self._blocks[block].memory.view
        return self.channel.send_pages(lead, headers, memory, pages[1:], self._page_size)

    def _write_pages(self, block: int, pages: Pages) -> int:
        """Pages in this order, zero pages among them where huge pages ask for it."""
        present = self._blocks[block].present[pages]
        edges = np.flatnonzero(present[1:] != present[:-1]) + 1
        size = 0
        for run in np.split(pages, edges) if len(pages) else ():
            if self._blocks[block].present[run[0]]:
                size += self._write_some(block, run)
            else:
                size += self._write_zeros(block, run)
        return size

    def _write_zeros(self, block: int, pages: Pages) -> int:
        lead = self._header(RAM_SAVE_FLAG_ZERO, block, int(pages[0])) + _ZERO_FILL
        return self.channel.send_parts((lead, zero_records(pages[1:], self._page_size).tobytes()))

    def _header(self, flags: int, block: int, page: int) -> bytes:
        """What a record begins with; written next, under the lock."""
        word = page * self._page_size | flags
        if block == self._last_block:
            return (word | RAM_SAVE_FLAG_CONTINUE).to_bytes(8, "big")
        self._last_block = block
        return word.to_bytes(8, "big") + self._names[block]


class _Prepared:
    """A batch with its gather vector; ``headers`` is what the vector points to."""

    __slots__ = ("address", "batch", "headers", "vector")

    def __init__(self, batch: Batch, vector: Vector | None, headers: object) -> None:
        self.batch = batch
        self.vector = vector
        self.address = 0 if vector is None else int(vector.__array_interface__["data"][0])
        self.headers = headers

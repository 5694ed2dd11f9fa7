"""RAM over multifd channels: one thread each, pages straight out of guest memory.

Pages are handed out in batches to whichever channel is free. A plain batch is one gather
write of some headers and their pages; a compressed packet is made and written by its
channel's thread alone.

Reference: stream format 3. What is written is what 9.0 and later write; older
destinations read it as well.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.codec.multifd import (
    PacketEncoder,
    header_bytes,
    packet_pages,
    set_data_bytes,
)
from migrationd.errors import ChannelClosed, MigrationCancelled
from migrationd.guest.memory import FileMemory
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.iovec import Vector, address_of, packet_vector
from migrationd.migration.stats import OutgoingStats
from migrationd.pageops.compress import Compressor, compressor
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter
from migrationd.transport.zero_copy import ZeroCopySender

PLAIN_PACKETS = 16
"""Packets of one gather write: 8 MiB of pages. With 8 of them Python takes twice the time."""

COMPRESSED_PACKETS = 4
ZERO_PACKETS = 64
"""Packets of zero pages of one write: 32 MiB of guest memory in 84 KiB."""

QUEUED_PAGES = 1 << 19
"""Pages that may wait to be sent: the numbers of 2 GiB, 4 MiB."""

LIVE_QUEUED_PAGES = 1 << 14
"""The same of a guest that runs: how it writes is looked at while its pages are handed out."""

LOOK_S = 0.25
"""How often somebody looks whether the destination closed a channel."""

Pages = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MultifdSettings:
    """Parameters of the channels.

    Attributes:
        channels: How many.
        compression: ``multifd-compression``.
        level: Of that method.
        zero_copy: ``zero-copy-send``.
        zero_page_detection: ``none`` sends zero pages whole, ``legacy`` on the main
            connection, ``multifd`` lists them in packets.
        uuid: What the hellos say, 16 bytes.
    """

    channels: int
    compression: str = "none"
    level: int = 1
    zero_copy: bool = False
    zero_page_detection: str = "multifd"
    uuid: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Pages of one block, alike in kind.

    Attributes:
        block: Their block.
        pages: Page numbers, shape ``(n,)``.
        is_zero: Whether they are zero pages.
        first_number: Packet number of the first packet.
        charged_bytes: What the bandwidth limit was charged with.
    """

    block: RamBlock
    pages: Pages
    is_zero: bool
    first_number: int
    charged_bytes: int


class MultifdSender:
    """All multifd channels of one outgoing migration.

    Used by the outgoing thread; a round runs on the channels' own threads.

    Args:
        channels: By number, their hello is sent; not owned.
        page_size: Target page size in bytes.
        settings: Parameters.
        is_live: Whether the pages may change while they are read.
        stats: Counters.
        limiter: Bandwidth limit of the whole migration.
        clock: Time.
        wait: Called with seconds to wait for the limit; raises when the migration ends.
        should_stop: Asked before each batch: what is not sent yet goes another way.
        sent: By block name one bool per page, set for pages that went out; or None.

    Raises:
        ConnectFailed: Zero copy is asked for and not possible.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        *,
        page_size: int,
        settings: MultifdSettings,
        is_live: bool,
        stats: OutgoingStats,
        limiter: RateLimiter,
        clock: Clock,
        wait: Callable[[float], None],
        should_stop: Callable[[], bool] = lambda: False,
        sent: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        self._page_size = page_size
        self._lists_zeros = settings.zero_page_detection == "multifd"
        self._stats = stats
        self._limiter = limiter
        self._clock = clock
        self._wait = wait
        self._should_stop = should_stop
        self._sent = sent
        self._packet_pages = packet_pages(page_size)
        self._header_bytes = header_bytes(page_size)
        self._changed = threading.Condition()
        self._queue: deque[tuple[RamBlock, Pages, bool]] = deque()
        self._queued_pages = 0
        self._most_queued_pages = LIVE_QUEUED_PAGES if is_live else QUEUED_PAGES
        self._round_ends = False
        self._error: BaseException | None = None
        self._number = 0
        self._executor: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._workers = [_Worker(channel, page_size, settings, is_live) for channel in channels]

    def sync(self) -> None:
        """Send a SYNC on every channel, behind all that it carried; between rounds.

        Raises:
            ChannelClosed: A channel broke or was shut down.
        """
        for worker in self._workers:
            size, missed_zero_copy = worker.sync(self._take_numbers(1))
            self._stats.sent_on_channel(size)
            self._stats.missed_zero_copy += missed_zero_copy

    def begin_round(self) -> None:
        """Start the channels' threads."""
        self._round_ends = False
        self._executor = ThreadPoolExecutor(len(self._workers), thread_name_prefix="multifd")
        self._running = [self._executor.submit(self._run, worker) for worker in self._workers]

    def put(self, block: RamBlock, pages: Pages, *, is_zero: bool) -> None:
        """Have pages of a block sent; waits while there is enough to do.

        Args:
            block: Block.
            pages: Page numbers, shape ``(n,)``.
            is_zero: Whether all of them are zero.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        if not len(pages):
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._queued_pages < self._most_queued_pages or self._is_stopping()
            )
            if self._error is None:
                self._queue.append((block, pages, is_zero))
                self._queued_pages += len(pages)
                self._changed.notify_all()
                return
        self.end_round()

    def _look_after_channels(self) -> None:
        """Notice a channel that the destination closed while nothing is sent on it."""
        for number, worker in enumerate(self._workers):
            if worker.is_hung_up():
                self._fail(ChannelClosed(f"the destination closed multifd channel {number}"))

    def end_round(self) -> None:
        """Wait until everything is sent.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        with self._changed:
            self._round_ends = True
            self._changed.notify_all()
        while wait(self._running, LOOK_S).not_done:
            self._look_after_channels()
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if self._error is not None:
            raise self._error
        self._queue.clear()
        self._queued_pages = 0

    def stop(self) -> None:
        """Hand out nothing more, end what is blocked and wait for it; in any state."""
        self._fail(MigrationCancelled("cancelled"))
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    def _run(self, worker: "_Worker") -> None:
        """Send batches until the round is over; on the thread of a channel."""
        try:
            while (batch := self._take(worker.packets)) is not None:
                self._account(batch, worker.send(batch))
        except BaseException as error:  # what it is, the sending thread decides
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
        for worker in self._workers:
            worker.channel.shutdown()

    def _take(self, packets: int) -> _Batch | None:
        """The next batch; None when the round is over."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._round_ends or self._error is not None
                )
                if not self._queue or self._is_stopping():
                    self._changed.notify_all()
                    return None
                delay_s = self._limiter.delay_s(self._clock.monotonic_s())
                if delay_s <= 0:
                    return self._next_batch(packets)
            self._wait(delay_s)

    def _is_stopping(self) -> bool:
        return self._error is not None or self._should_stop()

    def _next_batch(self, packets: int) -> _Batch:
        block, pages, is_zero = self._queue.popleft()
        lists_zeros = is_zero and self._lists_zeros
        limit = self._packet_pages * (ZERO_PACKETS if lists_zeros else packets)
        window_bytes = self._limiter.window_bytes
        if window_bytes is not None and not lists_zeros:
            # A window is shared by all channels: none may take it alone.
            share = window_bytes // (len(self._workers) * self._page_size)
            limit = max(1, min(limit, share))
        taken = pages[:limit]
        if len(pages) > limit:
            self._queue.appendleft((block, pages[limit:], is_zero))
        self._queued_pages -= len(taken)
        if self._sent is not None:
            self._sent[block.idstr][taken] = True
        self._changed.notify_all()
        count = -(-len(taken) // self._packet_pages)
        # With compression nobody knows yet: what is charged now is corrected afterwards.
        content = 0 if lists_zeros else len(taken) * self._page_size
        charged = count * self._header_bytes + content
        self._limiter.charge(charged)
        return _Batch(block, taken, is_zero, self._take_numbers(count), charged)

    def _account(self, batch: _Batch, byte_count: int) -> None:
        count = len(batch.pages)
        with self._changed:
            self._limiter.charge(byte_count - batch.charged_bytes)
            self._stats.sent_on_channel(
                byte_count,
                normal=0 if batch.is_zero else count,
                duplicate=count if batch.is_zero else 0,
            )
            self._stats.measure(self._clock.monotonic_s())

    def _take_numbers(self, count: int) -> int:
        first = self._number
        self._number += count
        return first


class _Worker:
    """One channel; during a round everything happens on its thread."""

    def __init__(
        self, channel: Channel, page_size: int, settings: MultifdSettings, is_live: bool
    ) -> None:
        self._is_live = is_live
        self.channel = channel
        self._page_size = page_size
        self._packet_pages = packet_pages(page_size)
        self._lists_zeros = settings.zero_page_detection == "multifd"
        self._encoder = PacketEncoder(page_size, settings.compression)
        self._compressor: Compressor | None = compressor(settings.compression, settings.level)
        self._zero_copy = ZeroCopySender(channel) if settings.zero_copy else None
        self._zeros = np.empty(0, np.uint8)

    def is_hung_up(self) -> bool:
        """Whether the destination closed the channel; not told of one that we closed."""
        try:
            return self.channel.is_hung_up()
        except ChannelClosed:
            return False

    @property
    def packets(self) -> int:
        """Most packets of a batch of pages with contents."""
        return PLAIN_PACKETS if self._compressor is None else COMPRESSED_PACKETS

    def sync(self, number: int) -> tuple[int, bool]:
        """Send a SYNC.

        Returns:
            Bytes sent, and whether zero copy was asked for and never happened.
        """
        missed = self._zero_copy.flush() if self._zero_copy is not None else False
        data = self._encoder.sync(number)
        self.channel.send(data)
        return len(data), missed

    def send(self, batch: _Batch) -> int:
        """Send a batch; returns the bytes on the wire."""
        lists_zeros = batch.is_zero and self._lists_zeros
        headers = self._encoder.headers(
            batch.block.idstr, batch.pages, batch.first_number, is_zero=lists_zeros
        )
        if lists_zeros:
            return self.channel.send_vector(_whole(headers))
        if self._compressor is not None:
            return sum(
                self._send_compressed(self._compressor, batch, headers[index], index)
                for index in range(len(headers))
            )
        if self._zero_copy is not None:
            headers = headers.copy()  # the kernel reads it later
        vector = self._plain_vector(batch, headers)
        if self._zero_copy is not None:
            return self._zero_copy.send(vector, headers)
        return self.channel.send_vector(vector)

    def _plain_vector(self, batch: _Batch, headers: npt.NDArray[np.uint8]) -> Vector:
        if not batch.is_zero:
            memory = batch.block.memory.view
            return packet_vector(headers, memory, batch.pages, self._page_size, self._packet_pages)
        # Every packet takes its pages from the same zeros.
        counts = np.full(len(headers), self._packet_pages)
        counts[-1] = len(batch.pages) - (len(headers) - 1) * self._packet_pages
        vector = np.empty((len(headers), 2, 2), np.uint64)
        steps = np.arange(len(headers), dtype=np.uint64) * np.uint64(headers.shape[1])
        vector[:, 0, 0] = steps + np.uint64(address_of(headers))
        vector[:, 0, 1] = headers.shape[1]
        vector[:, 1, 0] = address_of(self._zero_packet())
        vector[:, 1, 1] = counts * self._page_size
        return vector.reshape(-1, 2)

    def _send_compressed(
        self, method: Compressor, batch: _Batch, header: npt.NDArray[np.uint8], index: int
    ) -> int:
        first = index * self._packet_pages
        data = method(self._content(batch, batch.pages[first : first + self._packet_pages]))
        set_data_bytes(header, len(data))
        body = np.frombuffer(data, np.uint8)
        vector = np.concatenate((_whole(header), _whole(body)))
        return self.channel.send_vector(vector)

    def _content(self, batch: _Batch, pages: Pages) -> memoryview:
        """The pages' content in one piece; copied where they are not consecutive or may change.

        A compressor that reads its input twice must read the same bytes.
        """
        size = self._page_size
        if batch.is_zero:
            return self._zero_packet()[: len(pages) * size].data
        memory = batch.block.memory
        first, count = int(pages[0]), len(pages)
        is_run = int(pages[-1]) - first == count - 1
        if is_run and not self._is_live and not isinstance(memory, FileMemory):
            return memory.view[first * size : (first + count) * size].data
        return memory.read(pages).reshape(-1).data

    def _zero_packet(self) -> npt.NDArray[np.uint8]:
        if not len(self._zeros):
            self._zeros = np.zeros(self._packet_pages * self._page_size, np.uint8)
        return self._zeros


def _whole(array: npt.NDArray[np.uint8]) -> Vector:
    return np.array([[address_of(array), array.size]], np.uint64)

"""The threads of the postcopy phase: requests are answered, the rest is pushed.

The request server blocks in ``recv`` on the return path and writes the page itself: handing
the request to another thread costs more than the page.

Reference: stream format 5 and 6.4-6.6. A destination asks for pages that are under way; such
a request is dropped, for a second copy is fatal to it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
)
from migrationd.errors import ChannelClosed, PeerFailed, StreamCorrupt
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.priority import urgent_thread
from migrationd.migration.latency import LatencyStats
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.postcopy_pacer import GivesWay, Pacer, Shares
from migrationd.outgoing.postcopy_schedule import Batch, PageSchedule
from migrationd.outgoing.postcopy_writer import ZERO_WINDOW_PAGES, PageWriter
from migrationd.transport.channel import Channel

RECEIVE_BYTES = 16 << 10

BATCH_PAGES = 256
"""Pages whose gather vector is made at once."""

ANSWERED_AT_ONCE = 8
"""Pages of one write: each of them waits for the others to be copied."""

REQUESTS_KEPT = 1 << 20
"""Requests of which the order is remembered."""

MESSAGES_MAX = 4096
"""Messages other than requests that a destination may send on one connection; real ones send
one PONG per PING and one bitmap per block."""

_UNREAD_WAIT_S = 0.002
_UNREAD_LOOK_S = 0.0001

_REQUEST_LIMIT_BYTES = 1 << 30
"""Longest request: the largest huge page that there is."""


Answer = TypeVar("Answer")


class RequestLog:
    """Pages in the order in which they were asked for; one thread adds.

    Attributes:
        pages: Block index and page of each, packed; at most ``REQUESTS_KEPT``.
        turns: Requests that came and those that were dealt with, together.
    """

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.turns = 0
        self._passed: list[tuple[int, int, int, int]] = []
        self._passed_left = REQUESTS_KEPT

    def add(self, block: int, page: int) -> None:
        """Remember a request."""
        if len(self.pages) < REQUESTS_KEPT:
            self.pages.append(block << 40 | page)

    def add_passed(self, block: int, first: int, count: int, step: int) -> None:
        """Remember pages that the guest used before its last request, and did not ask for.

        Args:
            block: Index of the block.
            first: The first of them.
            count: How many, at least one.
            step: 1 upwards, -1 downwards.
        """
        self._passed_left -= count
        if self._passed_left >= 0:
            self._passed.append((len(self.pages) - 1, block << 40 | first, count, step))

    def take(self) -> npt.NDArray[np.int64]:
        """Block index and page of each, those that were passed among them; shape ``(n, 2)``."""
        packed = np.array(self.pages, np.int64)
        if self._passed:
            before, firsts, counts, steps = np.array(self._passed, np.int64).T
            ends = np.cumsum(counts)
            offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
            pages = np.repeat(firsts, counts) + offsets * np.repeat(steps, counts)
            packed = np.insert(packed, np.repeat(before, counts), pages)
        return np.stack((packed >> 40, packed & ((1 << 40) - 1)), axis=1)


class RequestServer:
    """Reads one return path and answers page requests; :meth:`run` is a thread.

    Args:
        channel: Main channel.
        blocks: RAM blocks.
        schedule: Who sends which page.
        stats: Counters; those of requests are written here only.
        latency: From the arrival of a request to its last byte.
        requests: Takes the order of requests.
        bitmap_limit_bytes: Largest received-page bitmap; 0 outside a recovery.
        on_message: Called on this thread with every other message.
        may_end: Tells whether the last byte of the stream is on its way.
    """

    def __init__(
        self,
        channel: Channel,
        blocks: Sequence[RamBlock],
        schedule: PageSchedule,
        stats: OutgoingStats,
        latency: LatencyStats,
        requests: RequestLog,
        *,
        bitmap_limit_bytes: int,
        on_message: Callable[[ReturnPathMessage], None],
        may_end: Callable[[], bool],
    ) -> None:
        self._channel = channel
        self._blocks = tuple(blocks)
        self._indexes = {block.idstr: index for index, block in enumerate(blocks)}
        self._schedule = schedule
        self._stats = stats
        self._latency = latency
        self._requests = requests
        self._decoder = ReturnPathDecoder(bitmap_limit_bytes)
        self._on_message = on_message
        self._may_end = may_end
        self._messages = 0
        self.expected = 0
        """Answers to more PINGs than a postcopy's own."""
        self._last_block: int | None = None
        self.writer: PageWriter | None = None
        """Where requested pages go; None as long as none may be asked for."""

    def run(self) -> None:
        """Read until the destination confirms that it holds the guest (SHUT 0).

        Raises:
            PeerFailed: SHUT with another value.
            ChannelClosed: The destination went away without a SHUT, or a channel broke.
            StreamError: Bytes that are no message, or a request that nobody may make.
        """
        with urgent_thread():
            self._run()

    def _run(self) -> None:
        while True:
            data = self._channel.recv_blocking(RECEIVE_BYTES)
            arrived_ns = time.perf_counter_ns()
            if not data:
                raise ChannelClosed(
                    "the destination closed the connection before it confirmed the migration"
                )
            singles: list[tuple[int, int]] = []
            for message in self._decoder.feed(data):
                if type(message) is RequestPages:
                    self._take(message, arrived_ns, singles)
                    if len(singles) < ANSWERED_AT_ONCE:
                        continue
                self._answer_singles(singles, arrived_ns)
                if type(message) is not RequestPages and self._obey(message):
                    return
            self._answer_singles(singles, arrived_ns)

    def _obey(self, message: ReturnPathMessage) -> bool:
        """Take a message that is no request; True after the last one."""
        match message:
            case Shut(value=0):
                if not self._may_end():
                    raise StreamCorrupt(
                        "SHUT 0 before the end of the stream", section="return path"
                    )
                return True
            case Shut(value=value):
                raise PeerFailed(f"Sibling indicated error {value}")
            case Pong() | SwitchoverAck() | RecvBitmap() | ResumeAck():
                self._messages += 1
                if self._messages > MESSAGES_MAX + len(self._blocks) + self.expected:
                    raise StreamCorrupt(f"more than {MESSAGES_MAX} messages", section="return path")
                self._on_message(message)
        return False

    def _take(self, request: RequestPages, arrived_ns: int, singles: list[tuple[int, int]]) -> None:
        """Answer a request, or add it to those that are answered together."""
        if self.writer is None:
            raise StreamCorrupt("a page request outside postcopy", section="return path")
        block, first, count = self._locate(request)
        self._stats.postcopy_requests += 1
        self._requests.add(block, first)
        if self._schedule.blocks[block].taken[first]:
            self._requests.turns += 2
            return  # under way: not worth waiting for the channel
        if count == 1:
            singles.append((block, first))
            return
        self._answer_singles(singles, arrived_ns)
        pages, size = self._write(partial(self.writer.answer, block, first, count)) or (0, 0)
        if pages:
            self._latency.add(time.perf_counter_ns() - arrived_ns)
            self._stats.answered(size, pages)
            self._follow(block, first, count)

    def _answer_singles(self, singles: list[tuple[int, int]], arrived_ns: int) -> None:
        """Answer requests for one page each together, and forget them."""
        if not singles:
            return
        assert self.writer is not None
        answered, size = self._write(partial(self.writer.answer_singles, singles)) or ([], 0)
        singles.clear()
        took_ns = time.perf_counter_ns() - arrived_ns
        if answered:
            self._stats.answered(size, len(answered))
        for block, page in answered:
            self._latency.add(took_ns)
            self._follow(block, page, 1)

    def _write(self, answer: Callable[[], Answer]) -> Answer | None:
        """Call the writer; None if the destination has all it needs, and closed the channel."""
        self._requests.turns += 1
        try:
            return answer()
        except ChannelClosed:
            if self._may_end():
                return None
            raise
        finally:
            self._requests.turns += 1

    def _follow(self, block: int, first: int, count: int) -> None:
        """Let the push go where an answered request goes, and remember what it passed over."""
        passed = self._schedule.requested(block, first, count)
        if passed is not None:
            self._requests.add_passed(block, *passed)

    def _locate(self, request: RequestPages) -> tuple[int, int, int]:
        """Block index, first target page and count of a request.

        Raises:
            StreamCorrupt: It names no pages of a block.
        """
        if request.idstr is not None:
            index = self._indexes.get(request.idstr)
            if index is None:
                raise StreamCorrupt(
                    f"a request for block {request.idstr!r}, which is not in the list",
                    section="return path",
                )
            self._last_block = index
        if self._last_block is None:
            raise StreamCorrupt("a request before any block was named", section="return path")
        index = self._last_block
        block = self._blocks[index]
        start, length = request.start, request.length
        host_page = block.page_size * self._schedule.blocks[index].host_pages
        if start % host_page or length % host_page or not 0 < length <= _REQUEST_LIMIT_BYTES:
            raise StreamCorrupt(
                f"a request for {length} bytes at {start:#x}, pages have {host_page} bytes",
                section="return path",
                block=block.idstr,
            )
        if start + length > block.used_length:
            raise StreamCorrupt(
                f"a request for {length} bytes at {start:#x}, outside the block of "
                f"{block.used_length:#x} bytes",
                section="return path",
                block=block.idstr,
            )
        return index, start // block.page_size, length // block.page_size


class Push:
    """Everything that nobody asks for, in the background; :meth:`run` is a thread.

    Args:
        writer: Main channel.
        schedule: What goes next.
        stats: Counters of this thread.
        pacer: ``max-postcopy-bandwidth``. What the guest asked for last time is exempt as it
            was when it was asked for: it is the same bytes, only sooner.
        gives_way: Holds it back for a while, but for what lies ahead of walks.
        requests: What it gives way to.
        clock: Time.
        stop: Set when the connection is given up.
        shares: How long its turns on the channel are.
        with_zeros: Push zero pages as well, after all others: nothing can be asked for then.
    """

    def __init__(
        self,
        writer: PageWriter,
        schedule: PageSchedule,
        stats: OutgoingStats,
        pacer: Pacer,
        gives_way: GivesWay,
        requests: RequestLog,
        clock: Clock,
        stop: threading.Event,
        *,
        shares: Shares,
        with_zeros: bool,
    ) -> None:
        self._writer = writer
        self._schedule = schedule
        self._stats = stats
        self._pacer = pacer
        self._gives_way = gives_way
        self._requests = requests
        self._clock = clock
        self._stop = stop
        self._with_zeros = with_zeros
        self._shares = shares
        writer.channel.limit_send_queue(shares.pace.queue_bytes)

    def run(self) -> None:
        """Push until every page is claimed.

        Raises:
            ChannelClosed: The channel ended, or the connection was given up.
        """
        while (batch := self._schedule.next_batch(BATCH_PAGES)) is not None:
            self._push(batch)
        if self._with_zeros:
            for batch in self._schedule.zero_batches(ZERO_WINDOW_PAGES):
                self._push(batch)

    def _push(self, batch: Batch) -> None:
        """Push a batch, or as much of it as goes before what follows a request."""
        while batch.done < len(batch.pages):
            if not self._may_push(batch):
                break
            self._wait(batch)
            sent, size = self._writer.push(batch, self._window_pages(batch))
            self._account(size, sent, batch)
            if self._schedule.has_restart and not batch.is_first:
                break
        self._schedule.broken_off(batch)

    def _window_pages(self, batch: Batch) -> int:
        """Pages of the next write."""
        if batch.is_zero:
            return ZERO_WINDOW_PAGES
        window = self._shares.window_pages(batch.is_first)
        most_bytes = self._pacer.most_bytes()
        if most_bytes is not None and not batch.is_learned:
            window = max(1, min(window, most_bytes // self._stats.page_size))
        return window

    def _may_push(self, batch: Batch) -> bool:
        """Give way to requests; False when what follows one of them goes before the batch."""
        if batch.is_first or (batch.walk is not None and batch.walk.is_sure):
            return True
        clock, requests = self._clock, self._requests
        while (hold_s := self._gives_way.hold_s(requests.turns, clock.monotonic_s())) > 0:
            if self._stop.wait(hold_s):
                raise ChannelClosed("the channel was shut down")
            if self._schedule.has_restart:
                return False
        return True

    def _wait(self, batch: Batch) -> None:
        now_s = self._clock.monotonic_s()
        while not batch.is_learned and (delay_s := self._pacer.delay_s(now_s)) > 0:
            if self._stop.wait(delay_s):
                raise ChannelClosed("the channel was shut down")
            now_s = self._clock.monotonic_s()
        channel = self._writer.channel
        if self._shares.update(self._schedule.strays, now_s):
            channel.limit_send_queue(self._shares.pace.queue_bytes)
        # Here rather than in the write, which is made while a request has to wait.
        channel.wait_writable()
        if self._shares.pace.unread_bytes:
            self._wait_read(self._shares.pace.unread_bytes)

    def _wait_read(self, most_bytes: int) -> None:
        """Let the destination read what lies in its kernel; for a while, for it is a guess."""
        end_s = self._clock.monotonic_s() + _UNREAD_WAIT_S
        while self._writer.channel.queued_bytes() > most_bytes:
            if self._stop.wait(_UNREAD_LOOK_S):
                raise ChannelClosed("the channel was shut down")
            if self._clock.monotonic_s() > end_s:
                return

    def _account(self, size: int, pages: int, batch: Batch) -> None:
        if not size:
            return
        now_s = self._clock.monotonic_s()
        if not batch.is_learned:
            self._pacer.charge(size, now_s)
        normal = 0 if batch.is_zero else min(pages, size // (self._stats.page_size + 8))
        self._stats.sent(size, normal=normal, duplicate=pages - normal)
        self._stats.measure(now_s)

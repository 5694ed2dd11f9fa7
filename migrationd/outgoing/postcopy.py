"""Postcopy out of a held guest: the switch, the push, and a new connection after a lost one.

    [preempt channel]  SWITCHOVER_START  END of other handlers  RAM_DISCARD...  PING 2
    PACKAGED { LISTEN  devices  PING 3  PING 0x42  RUN }  PING 4
    SECTION_PART ram { pages }  SECTION_END ram  EOF              preempt: pages

After the package the destination runs the guest, and nobody else may. Whether it was loaded
is known with the answer to PING 0x42. What is lost between the two leaves a guest that is
*paused*: the destination can go on with it, or a person who knows that the destination does
not run it can take it back.

Reference: stream format 6.4-6.6.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from migrationd.clock import Clock
from migrationd.codec.constants import (
    MIG_CMD_SWITCHOVER_START,
    QEMU_VM_EOF,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.postcopy import (
    PING_PACKAGE_LOADED,
    bitmap_bytes,
    encode_advise,
    encode_discards,
    encode_listen,
    encode_packaged,
    encode_ping,
    encode_recv_bitmap,
    encode_resume,
    encode_run,
    unpack_received,
)
from migrationd.codec.ram_encode import encode_eos
from migrationd.codec.records import Command
from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    ResumeAck,
    ReturnPathMessage,
    SwitchoverAck,
)
from migrationd.codec.section import encode_section_footer, encode_section_header
from migrationd.errors import ChannelError, StreamCorrupt
from migrationd.guest.base import Guest
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import page_runs
from migrationd.migration.dialect import Dialect
from migrationd.migration.latency import LatencyStats
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.device_save import encode_device, free_section_id
from migrationd.outgoing.postcopy_learned import Order, batches, fits, merge
from migrationd.outgoing.postcopy_pacer import FIRST_GIVES_WAY_S, GivesWay, Pacer, Shares
from migrationd.outgoing.postcopy_schedule import Batch, BlockPages, PageSchedule
from migrationd.outgoing.postcopy_server import BATCH_PAGES, Push, RequestLog, RequestServer
from migrationd.outgoing.postcopy_writer import PageWriter
from migrationd.outgoing.ram_save import RamSaver
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

_PREFETCH_PAGES = 2048

LEAD_S = 0.008
"""How long a guest that is to run at once waits for the pages that it is known to ask for."""

LEAD_PAGES = 2048
"""Each of them may cost the destination a range of pages to be forgotten."""

_LEAD_BATCH_PAGES = 64

SEND_QUEUE_BYTES = 128 << 10
"""What may lie in the kernel before a requested page on the same channel."""

MakeSaver = Callable[[Callable[[], bool]], RamSaver]
"""Makes a saver for the connection, which asks the argument when to stop."""

OpenChannel = Callable[[], Awaitable[Channel]]


@dataclass(frozen=True, slots=True)
class PostcopySettings:
    """What the monitor and the command line chose.

    Attributes:
        preempt: ``postcopy-preempt``.
        at_once: Switch before any RAM is sent.
        max_bandwidth_bytes_per_s: ``max-postcopy-bandwidth``; 0 is unlimited.
        is_loaded: The destination runs the guest already: an earlier daemon began.
        is_clone: What goes is a copy of a template, which nobody misses here.
        learned: The order in which the guest asked for its pages before; empty if that is to
            be learned now, None if nobody wants to know.
    """

    preempt: bool = False
    at_once: bool = False
    max_bandwidth_bytes_per_s: int = 0
    is_loaded: bool = False
    is_clone: bool = False
    learned: Order | None = None


class PostcopySource:
    """What outlives a connection: who has which page, requests and their latency.

    Args:
        guest: The guest; only read.
        dialect: Its wire dialect.
        settings: Capabilities and parameters.
        stats: Counters of the migration.
        clock: Time.

    Attributes:
        schedule: Who sends which page.
        latency: From the arrival of a request to its last byte.
        requests: Pages in the order in which they were asked for.
        pacer: ``max-postcopy-bandwidth``.
        gives_way: How the push leaves the guest alone while it is learned what it asks for.
        is_loaded: The destination said that it has loaded the package: it runs the guest.
    """

    def __init__(
        self,
        guest: Guest,
        dialect: Dialect,
        settings: PostcopySettings,
        stats: OutgoingStats,
        clock: Clock,
    ) -> None:
        self.guest = guest
        self.dialect = dialect
        self.settings = settings
        self.stats = stats
        self.clock = clock
        self.section_id = free_section_id(list(guest.devices))
        self.schedule = PageSchedule(
            [
                BlockPages(b.idstr, b.present, (b.backing_page_size or b.page_size) // b.page_size)
                for b in guest.ram
            ]
        )
        self.latency = LatencyStats()
        self.requests = RequestLog()
        self.pacer = Pacer(settings.max_bandwidth_bytes_per_s)
        self.is_loaded = settings.is_loaded
        self._learned: Order | None = None
        self.gives_way = GivesWay(
            FIRST_GIVES_WAY_S if settings.learned is not None and not len(settings.learned) else 0
        )
        if settings.learned is not None and fits(
            settings.learned, [block.page_count for block in guest.ram]
        ):
            self._learned = settings.learned
        self._requested = threading.Event()
        if settings.at_once:
            self._requested.set()

    @property
    def is_requested(self) -> bool:
        """Whether to switch as soon as possible; asked on any thread."""
        return self._requested.is_set()

    def request(self) -> None:
        """``migrate-start-postcopy``."""
        self._requested.set()

    def continue_counting(self) -> None:
        """Count what goes out as postcopy from here on."""
        self.stats.in_postcopy = True
        self.stats.remaining_pages = lambda: self.schedule.remaining_pages

    def plan(self) -> None:
        """Put what the guest asked for last time before everything else."""
        if self._learned is not None:
            self.schedule.push_first(self._learned_batches())

    def lead(self, make_saver: MakeSaver, stop: threading.Event) -> None:
        """Send what the guest will ask for first before it runs, for a short while.

        A destination places pages of a guest that does not run faster, and the guest never
        waits for them.

        Args:
            make_saver: Makes what sends pages of precopy.
            stop: Set when the connection is given up.

        Raises:
            ChannelError: The channel broke.
        """
        if self._learned is None or not len(self._learned):
            return
        end_s = self.clock.monotonic_s() + LEAD_S
        left = LEAD_PAGES

        def is_over() -> bool:
            return stop.is_set() or left <= 0 or self.clock.monotonic_s() > end_s

        saver = make_saver(is_over)
        saver.begin_parts()
        for batch in self._learned_batches(_LEAD_BATCH_PAGES):
            if is_over():
                break
            state = self.schedule.blocks[batch.block]
            if state.led is None:
                state.led = np.zeros(len(state.sent), np.bool_)
            pages = batch.pages[~state.sent[batch.pages]]
            block = self.guest.ram[batch.block]
            if not (batch.is_zero or block.memory.is_at_hand(pages)):
                break  # the guest runs sooner without
            saver.send(block, pages, is_zero=batch.is_zero)
            state.led[pages] = state.sent[pages]
            left -= len(pages)
        saver.end_parts()

    def prefetch(self, stop: threading.Event) -> None:
        """Begin to read from a file what goes first; a thread of its own."""
        if self._learned is None:
            return
        for start in range(0, len(self._learned), _PREFETCH_PAGES):
            part = self._learned[start : start + _PREFETCH_PAGES]
            for index, block in enumerate(self.guest.ram):
                pages = np.unique(part[part[:, 0] == index, 1])
                if stop.is_set():
                    return
                block.memory.prefetch(page_runs(pages[block.present[pages]]))

    def _learned_batches(self, batch_pages: int = BATCH_PAGES) -> Iterator[Batch]:
        assert self._learned is not None
        blocks = self.schedule.blocks
        return batches(
            self._learned,
            [block.present for block in blocks],
            [block.host_pages for block in blocks],
            batch_pages,
        )

    def learn(self) -> Order:
        """The order to follow next time."""
        return merge(self._learned, self.requests.take())

    def log_requests(self) -> None:
        """Say how requests were answered, if there were any."""
        latency = self.latency
        if latency.count:
            log.info(
                "%d page requests, %d answered: p50 %d us, p99 %d us, longest %d us",
                self.stats.postcopy_requests,
                latency.count,
                latency.quantile_ns(0.5) // 1000,
                latency.quantile_ns(0.99) // 1000,
                latency.longest_ns // 1000,
            )

    @property
    def footer(self) -> bytes:
        """Footer of RAM sections."""
        return encode_section_footer(self.section_id) if self.dialect.send_section_footers else b""

    def advise_bytes(self) -> bytes:
        """ADVISE: what the destination must agree with before the first section."""
        page_size = self.guest.page_size
        sizes = [page_size * block.host_pages for block in self.schedule.blocks]
        return encode_advise(sizes or [page_size], page_size)

    def switch_bytes(self) -> tuple[bytes, bytes]:
        """From the switchover to the package's end, and what leads to the first page."""
        parts = []
        if self.dialect.send_switchover_start:
            parts.append(StreamEncoder().encode(Command(MIG_CMD_SWITCHOVER_START, b"")))
        parts += [self._device(d) for d in self._late() if not _waits_for_postcopy(d)]
        for index, block in enumerate(self.guest.ram):
            ranges = self.schedule.discards(index)
            parts.append(encode_discards(block.idstr, ranges, block.page_size))
        devices = [
            self._device(device)
            for device in self.guest.devices
            if device.kind == QEMU_VM_SECTION_FULL and not device.is_early
        ]
        package = b"".join(
            (
                encode_listen(),
                *devices,
                encode_ping(3),
                encode_ping(PING_PACKAGE_LOADED),
                encode_run(),
            )
        )
        parts += [encode_ping(2), encode_packaged(package)]
        return b"".join(parts), encode_ping(4) + self.part_bytes()

    def part_bytes(self) -> bytes:
        """Header of the PART that holds the pages."""
        return encode_section_header(QEMU_VM_SECTION_PART, self.section_id)

    def end_bytes(self) -> bytes:
        """From the end of the last PART to EOF; no VMDESCRIPTION follows in postcopy."""
        return b"".join(
            (
                encode_eos() + self.footer,
                encode_section_header(QEMU_VM_SECTION_END, self.section_id),
                encode_eos() + self.footer,
                *(self._device(d) for d in self._late() if _waits_for_postcopy(d)),
                bytes([QEMU_VM_EOF]),
            )
        )

    def _late(self) -> list[DeviceState]:
        """Sections of live handlers other than RAM, behind their START."""
        return [
            device
            for device in self.guest.devices
            if device.kind not in (QEMU_VM_SECTION_START, QEMU_VM_SECTION_FULL)
        ]

    def _device(self, device: DeviceState) -> bytes:
        return encode_device(device, self.dialect)


class PostcopyLink:
    """One connection of a postcopy migration: its channels and threads.

    Lives on the event loop. The return path is read by a thread from the first byte on.

    Args:
        source: What outlives the connection.
        channel: Main channel; not owned.
        open_channel: Opens another connection to the same destination.
        executor: Runs what blocks; has room for three.
        on_loaded: Called on the loop when the destination has loaded the package.
        is_recovery: Whether the connection is a new one for a paused guest.
    """

    def __init__(
        self,
        source: PostcopySource,
        channel: Channel,
        open_channel: OpenChannel,
        executor: ThreadPoolExecutor,
        on_loaded: Callable[[], None],
        *,
        is_recovery: bool,
    ) -> None:
        self._source = source
        self._channel = channel
        self._open_channel = open_channel
        self._executor = executor
        self._on_loaded = on_loaded
        self._loop = asyncio.get_running_loop()
        self.has_switchover_ack = False
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._preempt: Channel | None = None
        self._package_end: int | None = None
        self._is_prefetching = False
        self._is_acknowledged = False
        self._first_pong = asyncio.Event()
        self._answers: asyncio.Queue[RecvBitmap | ResumeAck] = asyncio.Queue()
        blocks = source.guest.ram
        self._main = PageWriter(channel, blocks, source.schedule, source.guest.page_size)
        self._urgent = self._main
        largest = max((block.page_count for block in blocks), default=0)
        self._server = RequestServer(
            channel,
            blocks,
            source.schedule,
            source.stats,
            source.latency,
            source.requests,
            bitmap_limit_bytes=bitmap_bytes(largest) if is_recovery else 0,
            on_message=self._on_message,
            may_end=self._ending.is_set,
        )

    @property
    def may_run_there(self) -> bool:
        """Whether the destination has all that it needs to run the guest."""
        return self._package_end is not None and self._channel.bytes_sent >= self._package_end

    def set_ending(self) -> None:
        """The last byte of the stream is on its way: SHUT 0 may come."""
        self._ending.set()

    async def read(self) -> None:
        """Read the return path to SHUT 0; raises as :meth:`RequestServer.run`."""
        await self._loop.run_in_executor(self._executor, self._server.run)

    def shutdown(self) -> None:
        """End every blocked call; any number of times."""
        self._stop.set()
        if self._preempt is not None:
            self._preempt.shutdown()

    def close(self) -> None:
        """Close what was opened here, after the threads have ended."""
        self.shutdown()
        if self._preempt is not None:
            self._preempt.close()

    async def set_up(self) -> None:
        """Open the preempt channel where the destination reads nothing before it exists.

        Raises:
            ChannelError: It cannot be opened.
        """
        if self._source.settings.preempt and self._source.dialect.preempt_at_setup:
            await self._open_preempt()

    def prefetch(self) -> None:
        """Have the disk asked for what goes first; not waited for."""
        if not self._is_prefetching:
            self._is_prefetching = True
            self._executor.submit(self._source.prefetch, self._stop)

    async def lead(self, make_saver: MakeSaver) -> None:
        """Send what the guest asks for first, for a short while; before :meth:`switch`.

        Raises:
            ChannelError: The channel broke.
        """
        await self._run(self._source.lead, make_saver, self._stop)

    async def switch(self) -> None:
        """Send what makes the destination run the guest; requests are answered from here on.

        Raises:
            ChannelError: A channel broke. :attr:`may_run_there` says what that means.
        """
        if self._source.settings.preempt and self._preempt is None:
            await self._first_pong.wait()  # or this connection might be taken for the main one
            await self._open_preempt()
        await self._run(self._send_switch)
        self._note_loaded()

    def _send_switch(self) -> None:
        package, lead = self._source.switch_bytes()
        self._channel.limit_send_queue(SEND_QUEUE_BYTES)
        self._package_end = self._channel.bytes_sent + len(package)
        self._source.stats.sent(len(package) + len(lead))
        self._server.writer = self._urgent
        self._main.open(package + lead)
        self._source.continue_counting()

    async def recover(self) -> None:
        """Ask the destination what it has, and tell it to go on.

        Raises:
            ChannelError: A channel broke or cannot be opened.
            StreamCorrupt: The destination's answers do not fit the guest.
        """
        source = self._source
        await self.set_up()
        question = b"".join(encode_recv_bitmap(block.idstr) for block in source.guest.ram)
        await self._run(self._channel.send, question)
        for index, block in enumerate(source.guest.ram):
            answer = await self._answers.get()
            if not isinstance(answer, RecvBitmap) or answer.idstr != block.idstr:
                raise StreamCorrupt(
                    f"expected the received pages of '{block.idstr}', found "
                    f"{type(answer).__name__} {getattr(answer, 'idstr', '')}".rstrip(),
                    section="return path",
                )
            received = unpack_received(block.idstr, answer.bitmap, block.page_count)
            source.schedule.adopt_received(index, received)
        if source.settings.preempt and self._preempt is None:
            await self._open_preempt()
        self._package_end = 0
        await self._run(self._send_resume)
        await self._answers.get()

    def _send_resume(self) -> None:
        self._channel.limit_send_queue(SEND_QUEUE_BYTES)
        self._channel.send(encode_resume())

    async def push(self) -> None:
        """Send all that is left, and the end of the stream.

        Raises:
            ChannelError: A channel broke.
        """
        source = self._source
        source.plan()
        push = Push(
            self._main,
            source.schedule,
            source.stats,
            source.pacer,
            source.gives_way,
            source.clock,
            self._stop,
            shares=Shares(has_own_channel=self._preempt is not None),
            # A destination of this dialect reads the preempt channel up to its EOS only, and
            # newer programs wait for every page that was asked for before.
            with_zeros=self._preempt is not None and source.dialect.preempt_eos,
        )
        self.prefetch()
        await self._run(push.run)
        self._stop.set()
        self.set_ending()
        await self._run(self._main.finish, source.end_bytes())
        if self._preempt is not None and source.dialect.preempt_eos:
            await self._run(self._urgent.finish, encode_eos())

    async def _open_preempt(self) -> None:
        channel = await self._open_channel()
        self._preempt = channel
        if not channel.is_socket:
            raise ChannelError("Migration requires multi-channel URIs (e.g. tcp)")
        source = self._source
        self._urgent = PageWriter(
            channel, source.guest.ram, source.schedule, source.guest.page_size
        )
        self._urgent.open(b"")

    async def _run(self, call: Callable[..., object], *arguments: object) -> None:
        await self._loop.run_in_executor(self._executor, call, *arguments)

    def _on_message(self, message: ReturnPathMessage) -> None:
        """On the server's thread; what the next request depends on is done before it is read."""
        if isinstance(message, ResumeAck):
            if message.value != 1:
                raise StreamCorrupt(
                    f"RESUME_ACK {message.value}, expected 1", section="return path"
                )
            if self._package_end != 0 or self._server.writer is not None:
                raise StreamCorrupt("RESUME_ACK without RESUME", section="return path")
            self._main.open(self._source.part_bytes())
            self._server.writer = self._urgent
        elif isinstance(message, RecvBitmap) and self._server.writer is not None:
            raise StreamCorrupt(
                f"received-page bitmap of {len(message.bitmap)} bytes outside a recovery",
                section="return path",
                block=message.idstr,
            )
        self._loop.call_soon_threadsafe(self._take, message)

    def _note_loaded(self) -> None:
        """The answer may be here before the thread that sent the package has counted it."""
        if self._is_acknowledged and self.may_run_there:
            self._source.is_loaded = True
            self._on_loaded()

    def _take(self, message: ReturnPathMessage) -> None:
        match message:
            case Pong(value=value):
                self._first_pong.set()
                if value == PING_PACKAGE_LOADED and self._package_end is not None:
                    self._is_acknowledged = True
                    self._note_loaded()
            case SwitchoverAck():
                self.has_switchover_ack = True
            case RecvBitmap() | ResumeAck():
                self._answers.put_nowait(message)
            case _:
                pass


def _waits_for_postcopy(device: DeviceState) -> bool:
    """Whether a live handler's END comes after the switch."""
    return device.idstr == "dirty-bitmap"

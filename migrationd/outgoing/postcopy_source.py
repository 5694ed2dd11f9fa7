"""What a postcopy is made of, and what of it outlives a connection.

Who has which page, what the guest asks for first, how long its requests take; and the bytes
of the switch, which are the same on every connection.

Reference: stream format 6.4-6.6.
"""

import logging
import threading
from collections.abc import Callable, Iterator
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
    DISCARD_RANGES_MANY,
    DISCARD_RANGES_MAX,
    PING_PACKAGE_LOADED,
    encode_advise,
    encode_discards,
    encode_listen,
    encode_packaged,
    encode_ping,
    encode_run,
)
from migrationd.codec.ram_encode import encode_eos
from migrationd.codec.records import Command
from migrationd.codec.section import encode_section_footer, encode_section_header
from migrationd.guest.base import Guest
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import distinct, page_runs
from migrationd.migration.dialect import Dialect
from migrationd.migration.latency import LatencyStats
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.device_save import encode_device, free_section_id, full_sections
from migrationd.outgoing.postcopy_learned import Order, batches, fits, merge
from migrationd.outgoing.postcopy_pacer import FIRST_GIVES_WAY_S, GIVES_WAY_S, GivesWay, Pacer
from migrationd.outgoing.postcopy_schedule import Batch, BlockPages, PageSchedule
from migrationd.outgoing.postcopy_server import BATCH_PAGES, RequestLog
from migrationd.outgoing.ram_save import RamSaver

log = logging.getLogger(__name__)

_PREFETCH_PAGES = 2048

LEAD_S = 0.008
"""How long a guest that is to run at once waits for the pages that it is known to ask for."""

LEAD_PAGES = 2048
"""Each of them may cost the destination a range of pages to be forgotten."""

_LEAD_BATCH_PAGES = 64

MakeSaver = Callable[[Callable[[], bool]], RamSaver]
"""Makes a saver for the connection, which asks the argument when to stop."""


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
        self.gives_way = GivesWay(self._gives_way_s())
        if settings.learned is not None and fits(
            settings.learned, [block.page_count for block in guest.ram]
        ):
            self._learned = settings.learned
        self._requested = threading.Event()
        if settings.at_once:
            self._requested.set()

    def _gives_way_s(self) -> float:
        """For how long the push may leave the guest alone."""
        learned = self.settings.learned
        if learned is not None and not len(learned):
            return FIRST_GIVES_WAY_S
        # Behind a limit the push is rarely in the way, and what it does not use is lost.
        is_limited = self.guest.live is not None or self.settings.max_bandwidth_bytes_per_s
        return 0.0 if is_limited else GIVES_WAY_S

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
                pages = distinct(part[part[:, 0] == index, 1])
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
            most = DISCARD_RANGES_MAX if self.guest.live is None else DISCARD_RANGES_MANY
            parts.append(encode_discards(block.idstr, ranges, block.page_size, most))
        package = b"".join(
            (
                encode_listen(),
                *full_sections(self.guest, self.dialect),
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


def _waits_for_postcopy(device: DeviceState) -> bool:
    """Whether a live handler's END comes after the switch."""
    return device.idstr == "dirty-bitmap"

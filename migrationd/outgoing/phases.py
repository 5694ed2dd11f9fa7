"""The source's stream from its first to its last byte. The only place with this order.

    set-up      head of the stream, block list
    RAM         every page once; of a guest that executes, pass after pass
    switchover  the guest stands still; device state, or a postcopy's package
    completion  the destination holds the guest

The coroutines here keep the order; what moves bytes runs on the connection's thread.

Reference: QEMU's source; sequences in stream format 6.1-6.6, events in QEMU 11.1's order.
"""

import asyncio
import contextlib
import logging
import threading
from dataclasses import replace
from functools import partial

from migrationd.clock import Clock
from migrationd.codec.constants import FILE_HEADER_BYTES
from migrationd.errors import ChannelError, GuestError
from migrationd.guest.base import Guest, Live, held_still
from migrationd.guest.run_state import LazyHandOver
from migrationd.migration.dialect import Dialect
from migrationd.migration.stats import OutgoingStats
from migrationd.migration.status import Cause, StatusMachine
from migrationd.outgoing.compress_save import CompressSaver
from migrationd.outgoing.connection import OutgoingConnection
from migrationd.outgoing.contract import Observer, OutgoingSettings
from migrationd.outgoing.departing import advise_bitmaps, departing
from migrationd.outgoing.device_save import (
    ready_ping,
    stream_head,
    stream_tail,
)
from migrationd.outgoing.file_save import FileSettings
from migrationd.outgoing.live_save import UNACKNOWLEDGED, LiveSaver
from migrationd.outgoing.postcopy import PostcopyLink
from migrationd.outgoing.postcopy_source import PostcopySource
from migrationd.outgoing.progress import OutgoingProgress
from migrationd.outgoing.savers import Saver, Savers
from migrationd.transport.rate_limit import RateLimiter

log = logging.getLogger(__name__)


class Phases:
    """What one migration sends, over one connection after the other.

    Args:
        guest: The guest; only read.
        dialect: Wire dialect of the guest.
        settings: Capabilities and parameters.
        clock: Time.
        observer: Told of passes and the points of no return.
        status: Outgoing status.

    Attributes:
        progress: How far it is.
        postcopy: Who has which page, if the migration may become a postcopy.
        downtime_limit_ms: What the expected downtime starts from.
        available_bytes_per_s: Rate that the switchover is planned with; 0 is the measured one.
        xbzrle_cache_bytes: Of a guest that executes, with the capability.
        tail_started: Set when the whole guest is on its way.
    """

    keeps_guest = False
    """Whether the guest stays, whatever the destination gets."""

    outlives_guest = False
    """Whether what is sent is whole without the guest's process."""

    has_switchover = True
    """Whether the stream tells of one."""

    def __init__(
        self,
        guest: Guest,
        dialect: Dialect,
        settings: OutgoingSettings,
        clock: Clock,
        observer: Observer,
        status: StatusMachine,
    ) -> None:
        self._guest = guest = departing(guest, settings.sent_bitmaps)
        if not self.has_switchover:
            dialect = replace(dialect, send_switchover_start=False)
        self._dialect = dialect
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self._status = status
        self._stats = OutgoingStats(
            page_size=guest.page_size,
            total_bytes=sum(b.used_length for b in guest.ram if not b.is_elsewhere),
        )
        self.progress = OutgoingProgress(self._stats, clock)
        self._limiter = RateLimiter(settings.max_bandwidth_bytes_per_s)
        self.downtime_limit_ms = settings.downtime_limit_ms
        self.available_bytes_per_s = settings.avail_switchover_bytes_per_s
        self.xbzrle_cache_bytes = settings.xbzrle_cache_bytes or 0
        self.checkpoint_delay_ms = settings.checkpoint_delay_ms or 0
        self.postcopy: PostcopySource | None = None
        if settings.postcopy is not None:
            self.postcopy = PostcopySource(guest, dialect, settings.postcopy, self._stats, clock)
        self._savers = Savers(
            guest,
            dialect,
            settings,
            stats=self._stats,
            limiter=self._limiter,
            clock=clock,
            postcopy=self.postcopy,
            should_stop=self._is_postcopy_requested,
            xbzrle_cache_bytes=lambda: self.xbzrle_cache_bytes,
        )
        self.tail_started = threading.Event()
        self._continue = asyncio.Event()
        self._live_saver: LiveSaver | None = None
        self._was_running = False
        self._is_stopping = False
        self._connection: OutgoingConnection

    @property
    def has_return_path(self) -> bool:
        """Whether the destination's word is waited for."""
        return self._settings.return_path or self.postcopy is not None

    @property
    def _asks_first(self) -> bool:
        """Whether the guest runs on until the destination has read what the guest is."""
        hands_over = self._settings.hands_memory_over and self._settings.return_path
        return hands_over and self._guest.live is not None

    @property
    def stall(self) -> str | None:
        """Why it does not converge, if it does not."""
        if self._live_saver is None:
            return None
        is_unheard = self._asks_for_postcopy() and not self._may_switch_over()
        return UNACKNOWLEDGED if is_unheard else self._live_saver.stall

    @property
    def is_continued(self) -> bool:
        """Whether a pause before the switchover is at its end."""
        return self._continue.is_set()

    def continue_switchover(self) -> None:
        """Go on from ``pre-switchover``."""
        self._continue.set()

    def interrupt(self) -> None:
        """Wait for nobody's word any more: the migration is cancelled."""
        self.continue_switchover()

    def set_max_bandwidth(self, bytes_per_s: int) -> None:
        """Change the limit at once; 0 is unlimited, as the rest of a stopped guest is anyway."""
        if not (self._stats.in_switchover and self._guest.live is not None):
            self._limiter.set_rate(bytes_per_s)

    def use(self, connection: OutgoingConnection, *, is_recovery: bool) -> None:
        """Send over this connection from now on.

        Args:
            connection: Just made.
            is_recovery: Whether it is a new one for a paused postcopy.
        """
        self._connection = connection
        if self.postcopy is not None:
            connection.link = PostcopyLink(
                self.postcopy,
                connection.channel,
                connection.open_channel,
                connection.executor,
                self.package_loaded,
                connection.on_pong,
                is_recovery=is_recovery,
            )

    async def send(self) -> None:
        """The stream from its first to its last byte, phase by phase."""
        self._guest.check_unchanged()
        if self._settings.file is not None:
            await self._save_file(self._settings.file)
            return
        saver = await self._set_up()
        if self._connection.link is not None:
            self._connection.link.prefetch()
        if not self._settings.hands_memory_over:
            await self._save_ram(saver)
        await self._pause_before_switchover()
        is_lazy = self._is_postcopy_requested()
        if is_lazy and self._connection.link is not None and self._settings.multifd is None:
            await self._connection.link.lead(partial(self._savers.ram, self._connection))
        await self._begin_switchover(is_lazy=is_lazy)
        if is_lazy:
            link = self._connection.link
            assert link is not None
            if self._guest.live is not None:
                await self._connection.on_thread(self._leave_rest, self._guest.live)
            self._status.advance(Cause.POSTCOPY)
            await link.switch()
            await link.push()
        else:
            await self._switch_over(saver)

    async def recover(self) -> None:
        """The stream of a new connection in postcopy."""
        link = self._connection.link
        assert link is not None
        self._status.advance(Cause.RECOVER)
        await link.recover()
        self._status.advance(Cause.RECOVERED)
        self._mark_running_there()
        await link.push()

    def package_loaded(self) -> None:
        """The destination of a postcopy has loaded the devices: it runs the guest."""
        if self._status.can(Cause.PACKAGE_LOADED):
            self._status.advance(Cause.PACKAGE_LOADED)
            self._mark_running_there()

    def _mark_running_there(self) -> None:
        assert self.postcopy is not None
        self.postcopy.is_loaded = True
        self.progress.mark_running_there()
        self.progress.error = None
        self._observer.running_there()

    def _asks_for_postcopy(self) -> bool:
        return self.postcopy is not None and self.postcopy.is_requested

    def _is_postcopy_requested(self) -> bool:
        """Whether it is to begin now: as at QEMU, not before the destination agrees to it."""
        is_agreed = self._guest.live is None or self._may_switch_over()
        return is_agreed and self._asks_for_postcopy()

    async def _set_up(self) -> Saver:
        """Phase 1: what the destination must know before the first page."""
        head = stream_head(
            self._guest,
            self._dialect,
            return_path=self.has_return_path,
            uuid=self._settings.uuid,
            advise=self._advise(),
            capabilities=self._settings.validated_capabilities,
        )
        self._stats.dirty_sync_count = 1
        ram = self._savers.ram(self._connection)
        saver: Saver
        if self._settings.multifd is not None:
            # A destination of 8.0 and later waits for the first bytes of each connection, in turn.
            await self._connection.on_thread(self._write, head[:FILE_HEADER_BYTES])
            head = head[FILE_HEADER_BYTES:]
            multifd = self._savers.multifd(self._connection, self._settings.multifd)
            self._connection.multifd = multifd
            saver = await multifd.connect(ram, self._guest, self._dialect)
        else:
            saver = self._savers.encoding(ram)
        start = await self._connection.on_thread(saver.setup_bytes)
        if self._asks_first:
            start += ready_ping()
        try:
            await self._connection.on_thread(self._write, head + start)
        except ChannelError:
            # As in QEMU, which writes through a buffer: the set-up was done, the rest is not.
            self._advance(Cause.STREAM)
            raise
        if self._connection.link is not None:
            await self._connection.link.set_up()
        self.progress.mark_set_up()
        await self._stop_first()
        self._advance(Cause.STREAM)
        return saver

    def _advise(self) -> bytes:
        if self.postcopy is not None:
            return self.postcopy.advise_bytes()
        return advise_bitmaps() if self._settings.dirty_bitmaps else b""

    async def _stop_first(self) -> None:
        if self._asks_first:
            # What the destination has to do before the devices come is no downtime then.
            await self._connection.wait_peer_ready()
        if self._settings.stops_first and self._guest.live is not None:
            await self._stop_guest(self._guest.live)

    async def _save_ram(self, saver: Saver) -> None:
        """Phase 2: every page once, for a held guest dirties none; or pass after pass."""
        live = self._guest.live
        if live is None:
            await self._connection.on_thread(saver.save_all)
            return
        live_saver = self._make_live_saver(live, saver)
        if self._settings.stops_first:
            self._count_pass()
            await self._connection.on_thread(live_saver.send_stopped)
            return
        self._live_saver = live_saver
        await self._converge(live_saver, live)

    async def _converge(self, live_saver: LiveSaver, live: Live) -> None:
        """Pass after pass, until the guest stands still and what is left fits the limit."""
        while True:
            await self._connection.on_thread(live_saver.converge)
            self._advance(None)
            await self._observer.hold_still()
            # Its user may have stopped it, or let it go on, while it was sent.
            self._was_running = live.is_running
            if not self._was_running:
                break
            self._is_stopping = True
            stop_s = self._clock.monotonic_s()
            if await self._connection.on_thread(live_saver.stop):
                self.progress.mark_switchover(stop_s)
                self._tell_stopped()
                break
            self._is_stopping = False
            self._observer.let_go()
        self.progress.mark_switchover()
        self._limiter.set_rate(0)

    def _tell_stopped(self) -> None:
        self._is_stopping = False
        self._observer.on_stopped()

    def ended(self) -> None:
        """Nothing of the connection runs any more; a guest that was just being stopped was."""
        live = self._guest.live
        if self._is_stopping and live is not None and not live.is_running:
            self._tell_stopped()

    def _held_still(
        self, live: Live, loop: asyncio.AbstractEventLoop
    ) -> contextlib.AbstractContextManager[bool]:
        """See :func:`held_still`; on the sending thread."""
        return held_still(
            live,
            lambda: loop.call_soon_threadsafe(self._observer.on_stopped),
            lambda: loop.call_soon_threadsafe(self._observer.on_resumed),
        )

    def _count_pass(self) -> None:
        self._stats.dirty_sync_count += 1
        self._observer.on_pass(self._stats.dirty_sync_count)

    async def _stop_guest(self, live: Live) -> None:
        self._advance(None)
        self.progress.mark_switchover()
        # The guest stands still: what is left goes as fast as it can, as at QEMU.
        self._limiter.set_rate(0)
        await self._observer.hold_still()
        self._was_running = live.is_running
        if self._was_running:
            self._is_stopping = True
            await self._connection.on_thread(live.stop)
            self._tell_stopped()

    def _make_live_saver(self, live: Live, saver: Saver) -> LiveSaver:
        assert not isinstance(saver, CompressSaver)
        loop = asyncio.get_running_loop()

        def on_pass() -> None:
            loop.call_soon_threadsafe(self._observer.on_pass, self._stats.dirty_sync_count)

        return LiveSaver(
            saver,
            live,
            list(self._guest.ram),
            self._savers.convergence(),
            stats=self._stats,
            clock=self._clock,
            downtime_limit_s=lambda: self.downtime_limit_ms / 1000,
            available_bytes_per_s=lambda: self.available_bytes_per_s,
            may_switch_over=self._may_switch_over,
            wait_for_peer=self._wait_for_peer,
            on_pass=on_pass,
            wait=self._connection.wait,
            sent=self._savers.sent,
            should_stop=self._is_postcopy_requested,
        )

    def _wait_for_peer(self) -> None:
        if self._connection.can_ask:
            self._stats.sent(self._connection.ask())

    def _may_switch_over(self) -> bool:
        return not self._settings.switchover_ack or self._connection.has_switchover_ack

    async def _begin_switchover(self, *, is_lazy: bool = False) -> None:
        """Put the hand-over on record; the next byte may be the one that moves the guest."""
        self._stats.dirty_sync_count += 1
        if self._guest.live is None:
            self._observer.on_pass(self._stats.dirty_sync_count)
        self.progress.mark_switchover()
        self._guest.check_unchanged()
        settings = self._settings.postcopy
        lazy = LazyHandOver(settings.preempt, is_loaded=False) if settings and is_lazy else None
        await self._observer.before_switchover(lazy)
        self._advance(Cause.SWITCHOVER)

    async def _switch_over(self, saver: Saver) -> None:
        """Phase 3: the guest leaves with its devices."""
        if self._live_saver is not None:
            await self._connection.on_thread(self._live_saver.finish)
        await self._connection.on_thread(self._send_devices, saver)

    def _send_devices(self, saver: Saver) -> None:
        if self._guest.live is not None:
            self._save_devices(self._guest.live)
        end = saver.end_bytes()
        tail = stream_tail(
            self._guest,
            self._dialect,
            end,
            uuid=self._settings.uuid,
            capabilities=self._settings.validated_capabilities,
        )
        self._write_tail(tail)

    async def _save_file(self, settings: FileSettings) -> None:
        """The same phases into a mapped-ram file."""
        save = self._savers.file(self._connection, settings)
        self._stats.dirty_sync_count = 1
        await self._connection.on_thread(save.set_up)
        self.progress.mark_set_up()
        await self._stop_first()
        self._advance(Cause.STREAM)
        if (live := self._guest.live) is not None:
            # A page has one place: what stands still needs one pass.
            self._count_pass()
            if not self._settings.stops_first:
                await self._stop_guest(live)
        await self._connection.on_thread(save.save_ram)
        await self._pause_before_switchover()
        await self._begin_switchover()
        if live is not None:
            await self._connection.on_thread(self._save_devices, live)
        self.tail_started.set()
        await self._connection.on_thread(save.switch_over)

    def _leave_rest(self, live: Live) -> None:
        """A postcopy sends what is left of a guest that executed."""
        assert self._live_saver is not None
        assert self.postcopy is not None
        self._live_saver.leave_rest()
        self.postcopy.schedule.recount()
        self._save_devices(live)

    def _save_devices(self, live: Live) -> None:
        live.save_devices(was_running=self._was_running)

    async def _pause_before_switchover(self) -> None:
        if self._settings.pause_before_switchover:
            self._advance(Cause.PAUSE_BEFORE_SWITCHOVER)
            await self._continue.wait()

    def _advance(self, cause: Cause | None) -> None:
        """Go on to the next status, if there is one, unless the migration was cancelled."""
        self._connection.check()
        if cause is not None:
            self._status.advance(cause)

    def _write(self, data: bytes) -> None:
        self._connection.channel.send(data)
        self._stats.sent(len(data))

    def _write_tail(self, data: bytes) -> None:
        self.tail_started.set()
        if self._connection.link is not None:
            self._connection.link.set_ending()
        self._write(data)

    async def complete(self) -> None:
        """The destination has everything, and said so if it was asked."""
        self.progress.mark_end()
        self.package_loaded()
        if self.postcopy is not None:
            self.postcopy.log_requests()
            self._observer.on_learned(self.postcopy.learn())
        await self._observer.handed_over()
        self._status.advance(Cause.COMPLETE)

    async def unthrottle(self) -> None:
        """Let a guest that was slowed down have its time again, however it ended."""
        if self._live_saver is None:
            return
        try:
            await self._connection.on_thread(self._live_saver.release)
        except GuestError as error:
            log.warning("the guest stays throttled: %s", error)

"""The source side: set-up, RAM, switchover, completion. The only place with this order.

    setup           connecting; then the head of the stream and the block list
    active          RAM goes out
    pre-switchover  only with pause-before-switchover, until migrate-continue
    device          device state goes out, then the destination's SHUT 0 is awaited
    completed       the destination holds the guest

    postcopy-device         instead: the destination loads the devices, to run the guest
    postcopy-active         it runs the guest, and memory follows
    postcopy-paused         the connection was lost; ``resume`` gives another one
    postcopy-recover-setup  connecting; postcopy-recover: agreeing on who has which page

The coroutine here keeps the order; what moves bytes runs in an executor thread of
this migration, and the return path is a coroutine beside it. A blocked thread ends
because its channel is shut down.

Reference: QEMU's source; sequences in stream format 6.1-6.3, events in QEMU 11.1's order.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.codec.constants import FILE_HEADER_BYTES
from migrationd.errors import (
    ChannelError,
    GuestError,
    InvalidState,
    MigrationCancelled,
    MigrationdError,
    MigrationError,
    PeerFailed,
)
from migrationd.guest.base import Guest, Live
from migrationd.guest.run_state import LazyHandOver
from migrationd.migration.convergence import Convergence
from migrationd.migration.dialect import Dialect
from migrationd.migration.info import MigrationInfo
from migrationd.migration.stats import OutgoingStats
from migrationd.migration.status import Cause, Role, StatusMachine
from migrationd.outgoing.contract import Observer, OutgoingSettings
from migrationd.outgoing.device_save import free_section_id, stream_head, stream_tail
from migrationd.outgoing.file_save import FileSave, FileSettings
from migrationd.outgoing.live_save import LiveSaver
from migrationd.outgoing.multifd_connect import OutgoingMultifd
from migrationd.outgoing.multifd_save import MultifdSaver
from migrationd.outgoing.multifd_send import MultifdSettings
from migrationd.outgoing.postcopy import (
    OpenChannel,
    PostcopyLink,
    PostcopySource,
)
from migrationd.outgoing.ram_save import PART_BYTES, RamSaver
from migrationd.outgoing.return_path import ReturnPath
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

log = logging.getLogger(__name__)

Saver = RamSaver | MultifdSaver
Sent = dict[str, npt.NDArray[np.bool_]]
"""By block name one bool per page, set for pages that went out."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_POSTCOPY = frozenset(
    (
        "postcopy-device",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
    )
)
_STATUSES_WITH_RAM = _POSTCOPY | {"active", "cancelling", "pre-switchover", "device", "completed"}
PAUSABLE = ("postcopy-active", "postcopy-recover")
"""Statuses in which ``migrate-pause`` is possible."""


class OutgoingMigration:
    """One outgoing migration of a held guest.

    Lives on the event loop; :meth:`run` is one task owned by the daemon.

    Args:
        guest: The guest; only read.
        dialect: Wire dialect of the guest.
        settings: Capabilities and parameters.
        clock: Time.
        observer: Told of statuses, passes and the points of no return.
    """

    def __init__(
        self,
        guest: Guest,
        dialect: Dialect,
        settings: OutgoingSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._guest = guest
        self._dialect = dialect
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self._status = StatusMachine(Role.OUTGOING, observer.on_status)
        self._stats = OutgoingStats(
            page_size=guest.page_size,
            total_bytes=sum(block.used_length for block in guest.ram),
        )
        self._limiter = RateLimiter(settings.max_bandwidth_bytes_per_s)
        self._downtime_limit_ms = settings.downtime_limit_ms
        self._available_bytes_per_s = settings.avail_switchover_bytes_per_s
        self._live_saver: LiveSaver | None = None
        self._was_running = False
        self._continue = asyncio.Event()
        self._stop = threading.Event()
        self._tail_started = threading.Event()
        self._executor = ThreadPoolExecutor(3, thread_name_prefix="outgoing")
        self._channel: Channel | None = None
        self._postcopy: PostcopySource | None = None
        if settings.postcopy is not None and guest.live is None:
            self._postcopy = PostcopySource(guest, dialect, settings.postcopy, self._stats, clock)
        self._link: PostcopyLink | None = None
        self._resumed: asyncio.Future[OpenChannel] | None = None
        self._open_channel: OpenChannel | None = None
        self._multifd: OutgoingMultifd | None = None
        self._work: asyncio.Task[None] | None = None
        self._error: MigrationdError | None = None
        self._is_yanked = False
        self._start_s = clock.monotonic_s()
        self._setup_s: float | None = None
        self._switchover_s: float | None = None
        self._running_there_s: float | None = None
        self._end_s: float | None = None

    @property
    def status(self) -> str:
        """Outgoing MigrationStatus."""
        return self._status.status

    @property
    def is_running(self) -> bool:
        """Whether it is still in progress, clean-up included."""
        return self._status.is_running

    @property
    def error(self) -> MigrationdError | None:
        """Why it failed."""
        return self._error

    @property
    def may_be_elsewhere(self) -> bool:
        """Whether the whole guest was on its way, so that the destination may run it."""
        return self._tail_started.is_set()

    def begin(self) -> None:
        """Enter ``setup``."""
        self._status.advance(Cause.START)

    async def run(self, open_channel: OpenChannel | None) -> None:
        """Carry the migration to its end; never raises for a failed migration.

        Args:
            open_channel: Connects to the destination; called again for further channels. None
                if an earlier daemon began it: it waits in ``postcopy-paused`` to be resumed.
        """
        self._work = asyncio.create_task(self._migrate(open_channel), name="outgoing")
        try:
            await asyncio.wait((self._work,))
        except asyncio.CancelledError:
            self.cancel()
            if self.is_in_postcopy:
                self._work.cancel()
            await asyncio.wait((self._work,))
        if self._work.cancelled():
            if self.is_in_postcopy:
                log.warning("the guest's memory is not all at its destination, which runs it")
            elif self._is_yanked and self._status.status != "cancelling":
                await self._settle_failure(ChannelError("the connection was cut off by yank"))
            else:
                await self._settle_cancel()
            return
        error = self._work.exception()
        if error is None:
            return
        if self._status.status == "cancelling":
            await self._settle_cancel()
        elif isinstance(error, MigrationdError):
            await self._settle_failure(error)
        else:
            log.error("internal error in the outgoing migration", exc_info=error)
            await self._settle_failure(MigrationError(f"internal error: {error!r}"))

    def cancel(self) -> None:
        """Cancel as ``migrate_cancel`` does: status ``cancelling`` now, the rest follows.

        Does nothing when there is nothing to cancel.
        """
        if not self._status.can(Cause.CANCEL):
            return
        if self.status == "pre-switchover":
            self._error = MigrationError("Switchover is interrupted")
        self._status.advance(Cause.CANCEL)
        self._interrupt()

    @property
    def is_in_postcopy(self) -> bool:
        """Whether the destination runs the guest, or may run it, without all of its memory."""
        return self._status.status in _POSTCOPY

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as possible; nothing without the capability."""
        if self._postcopy is not None:
            self._postcopy.request()

    def pause(self) -> None:
        """Break the connection of a postcopy, to be resumed over another one.

        Raises:
            InvalidState: There is none.
        """
        if self.status not in PAUSABLE:
            raise InvalidState(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        for channel in (self._channel, self._link):
            if channel is not None:
                channel.shutdown()

    def yank(self) -> None:
        """Cut all connections off: the migration fails, a postcopy is paused."""
        if self._channel is None and self._work is not None:
            self._is_yanked = True
            self._work.cancel()
        for channel in (self._channel, self._link):
            if channel is not None:
                channel.shutdown()

    def resume(self, open_channel: OpenChannel) -> None:
        """Go on from ``postcopy-paused`` over a new connection.

        Args:
            open_channel: Connects to the destination; called again for further channels.

        Raises:
            InvalidState: Nothing is paused.
        """
        if self.status != "postcopy-paused" or self._resumed is None or self._resumed.done():
            raise InvalidState("Cannot resume if there is no paused migration")
        self._status.advance(Cause.RECOVER_SETUP)
        self._resumed.set_result(open_channel)

    @property
    def may_be_taken_back(self) -> bool:
        """Whether a paused postcopy's destination never said that it runs the guest."""
        is_paused = self.status == "postcopy-paused" and self._resumed is not None
        return is_paused and self._postcopy is not None and not self._postcopy.is_loaded

    def take_back(self) -> None:
        """Give a paused postcopy up: somebody knows that the destination does not run the guest.

        Raises:
            InvalidState: It does, or nothing is paused.
        """
        if not self.may_be_taken_back or self._resumed is None or self._resumed.done():
            raise InvalidState("Migration is not finalized yet")
        self._status.advance(Cause.FAIL)
        self._resumed.set_exception(MigrationError("the guest was taken back"))

    def continue_switchover(self) -> None:
        """Go on from ``pre-switchover``."""
        self._continue.set()

    def set_max_bandwidth(self, bytes_per_s: int) -> None:
        """Change the limit at once; 0 is unlimited, as the rest of a stopped guest is anyway."""
        if not (self._stats.in_switchover and self._guest.live is not None):
            self._limiter.set_rate(bytes_per_s)

    def set_max_postcopy_bandwidth(self, bytes_per_s: int) -> None:
        """Change the limit of the background push at once; 0 is unlimited."""
        if self._postcopy is not None:
            self._postcopy.pacer.set_rate(bytes_per_s)

    def set_downtime_limit(self, limit_ms: int) -> None:
        """Change the limit that the expected downtime starts from."""
        self._downtime_limit_ms = limit_ms

    def set_avail_switchover_bandwidth(self, bytes_per_s: int) -> None:
        """Change the rate that the switchover is planned with; 0 is the measured one."""
        self._available_bytes_per_s = bytes_per_s

    def info(self) -> MigrationInfo | None:
        """The source's part of ``query-migrate``; None before anything happened."""
        status = self.status
        if status == "none":
            return None
        error_desc = None if self._error is None else str(self._error)
        if self._live_saver is not None and status == "active":
            error_desc = self._live_saver.stall
        if status not in _STATUSES_WITH_RAM:
            return MigrationInfo(status=status, error_desc=error_desc)
        completed = status == "completed"
        now_s = self._end_s if self._end_s is not None else self._clock.monotonic_s()
        ram = self._stats.snapshot(completed=completed)
        latency = None
        if self._postcopy is not None and self._settings.postcopy_blocktime and completed:
            latency = self._postcopy.latency
        downtime_s = None
        if completed or self.is_in_postcopy:
            downtime_s = (self._running_there_s or now_s) - (self._switchover_s or now_s)
        return MigrationInfo(
            status=status,
            error_desc=error_desc,
            total_time_ms=_ms(now_s - self._start_s),
            setup_time_ms=_ms((self._setup_s or self._start_s) - self._start_s),
            downtime_ms=None if downtime_s is None else _ms(downtime_s),
            cpu_throttle_percentage=self._stats.throttle_percentage,
            expected_downtime_ms=None
            if completed or self.is_in_postcopy
            else self._stats.expected_downtime_ms(self._downtime_limit_ms),
            remaining_bytes=None if completed else ram.remaining,
            ram=ram,
            postcopy_latency_ns=latency.mean_ns if latency is not None else None,
            postcopy_latency_dist=latency.distribution() if latency is not None else None,
        )

    async def _migrate(self, open_channel: OpenChannel | None) -> None:
        failure: MigrationdError | None
        if open_channel is None:
            assert self._postcopy is not None
            self._postcopy.continue_counting()
            failure = MigrationError("the daemon that sent the guest ended before its memory did")
        else:
            failure = await self._attempt(open_channel, self._send)
        while failure is not None:
            opener = await self._paused(failure)
            self._stop = threading.Event()
            self._executor = ThreadPoolExecutor(3, thread_name_prefix="outgoing")
            failure = await self._attempt(opener, self._recover)

    async def _paused(self, failure: MigrationdError) -> OpenChannel:
        """Wait in ``postcopy-paused`` for another connection."""
        self._error = failure
        log.error("the migration is paused: %s", failure)
        self._resumed = asyncio.get_running_loop().create_future()
        self._status.advance(Cause.PAUSE)
        return await self._resumed

    async def _attempt(
        self, open_channel: OpenChannel, send: Callable[[Channel], Awaitable[None]]
    ) -> MigrationdError | None:
        """Try one connection.

        Returns:
            None when the migration is complete; what broke a postcopy that can be resumed.

        Raises:
            Exception: What broke a migration whose guest stays here.
        """
        try:
            await self._connection(open_channel, send)
        except Exception as error:
            if not self._may_run_there(error):
                raise
            if isinstance(error, MigrationdError):
                return error
            log.error("internal error in the outgoing migration", exc_info=error)
            return MigrationError(f"internal error: {error!r}")
        return None

    def _may_run_there(self, error: Exception) -> bool:
        """Whether the destination may run the guest after a connection ended with an error."""
        if self._postcopy is None or self.status == "cancelling":
            return False
        if self._postcopy.is_loaded or self.status != "postcopy-device":
            return self.is_in_postcopy
        has_refused = isinstance(error, PeerFailed)
        return self._link is not None and self._link.may_run_there and not has_refused

    async def _connection(
        self, open_channel: OpenChannel, send: Callable[[Channel], Awaitable[None]]
    ) -> None:
        channel: Channel | None = None
        self._link = None
        try:
            channel = self._channel = await open_channel()
            self._open_channel = open_channel
            if self._has_return_path and not channel.is_duplex:
                name = "return-path" if self._postcopy is None else "postcopy-ram"
                raise ChannelError(
                    f"this transport has no way back for the {name} capability; turn it off"
                )
            if self._postcopy is not None:
                self._link = PostcopyLink(
                    self._postcopy,
                    channel,
                    open_channel,
                    self._executor,
                    self._package_loaded,
                    is_recovery=self.is_in_postcopy,
                )
            await self._stream(channel, send)
        finally:
            self._stop.set()
            for end in (channel, self._multifd, self._link):
                if end is not None:
                    end.shutdown()
            await self._unthrottle()
            # A multifd channel's thread ends with the packet that it compresses.
            await asyncio.to_thread(self._end_threads)
            for end in (channel, self._multifd, self._link):
                if end is not None:
                    end.close()
            self._channel = None

    def _end_threads(self) -> None:
        if self._multifd is not None:
            self._multifd.stop()
        self._executor.shutdown(wait=True)

    async def _unthrottle(self) -> None:
        """Let a guest that was slowed down have its time again, however it ended."""
        if self._live_saver is None:
            return
        try:
            await self._on_thread(self._live_saver.release)
        except GuestError as error:
            log.warning("the guest stays throttled: %s", error)

    @property
    def _has_return_path(self) -> bool:
        return self._settings.return_path or self._postcopy is not None

    async def _stream(self, channel: Channel, send: Callable[[Channel], Awaitable[None]]) -> None:
        if not self._has_return_path:
            await send(channel)
            await self._on_thread(channel.finish)
            await self._complete()
            return
        read = self._link.read if self._link else ReturnPath(channel, self._tail_started.is_set).run
        reader = asyncio.create_task(read(), name="return path")
        sender = asyncio.ensure_future(send(channel))
        try:
            await asyncio.wait((reader, sender), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and reader.exception() is not None:
                reader.result()
            try:
                await sender
            except ChannelError:
                # The destination's own word says more than a broken pipe.
                await asyncio.wait((reader,), timeout=0.2)
                if reader.done():
                    reader.result()
                raise
            await reader
            await self._complete()
        finally:
            self._stop.set()
            for end in (channel, self._link):
                if end is not None:
                    end.shutdown()
            for task in (reader, sender):
                task.cancel()
            await asyncio.gather(reader, sender, return_exceptions=True)

    async def _send(self, channel: Channel) -> None:
        """The stream from its first to its last byte, phase by phase."""
        self._guest.check_unchanged()
        if self._settings.file is not None:
            await self._save_file(channel, self._settings.file)
            return
        saver = await self._set_up(channel)
        await self._save_ram(saver)
        await self._pause_before_switchover()
        is_lazy = self._is_postcopy_requested()
        await self._begin_switchover(is_lazy=is_lazy)
        if is_lazy:
            assert self._link is not None
            self._status.advance(Cause.POSTCOPY)
            await self._link.switch()
            await self._link.push()
        else:
            await self._switch_over(channel, saver)

    async def _recover(self, channel: Channel) -> None:
        """The stream of a new connection in postcopy."""
        assert self._link is not None
        self._status.advance(Cause.RECOVER)
        await self._link.recover()
        self._status.advance(Cause.RECOVERED)
        self._mark_running_there()
        await self._link.push()

    def _package_loaded(self) -> None:
        if self._status.can(Cause.PACKAGE_LOADED):
            self._status.advance(Cause.PACKAGE_LOADED)
            self._mark_running_there()

    def _mark_running_there(self) -> None:
        assert self._postcopy is not None
        self._postcopy.is_loaded = True
        if self._running_there_s is None:
            self._running_there_s = self._clock.monotonic_s()
        self._error = None
        self._observer.running_there()

    def _ram_saver(self, channel: Channel) -> RamSaver:
        return RamSaver(
            channel,
            list(self._guest.ram),
            section_id=free_section_id(list(self._guest.devices)),
            has_footers=self._dialect.send_section_footers,
            page_size=self._guest.page_size,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=self._wait,
            should_stop=self._is_postcopy_requested,
            sent=self._sent_pages(),
            names_page_sizes=self._postcopy is not None,
            part_bytes=PART_BYTES if self._settings.multifd is None else None,
            detects_zeros=self._settings.detects_zero_pages,
        )

    def _is_postcopy_requested(self) -> bool:
        return self._postcopy is not None and self._postcopy.is_requested

    def _sent_pages(self) -> Sent | None:
        if self._postcopy is None:
            return None
        return {block.idstr: block.sent for block in self._postcopy.schedule.blocks}

    async def _set_up(self, channel: Channel) -> Saver:
        """Phase 1: what the destination must know before the first page."""
        head = stream_head(
            self._guest,
            self._dialect,
            return_path=self._has_return_path,
            uuid=self._settings.uuid,
            advise=self._postcopy.advise_bytes() if self._postcopy is not None else b"",
        )
        self._stats.dirty_sync_count = 1
        ram = self._ram_saver(channel)
        saver: Saver = ram
        if self._settings.multifd is not None:
            # A destination of 8.0 and later waits for the first bytes of each connection, in turn.
            await self._on_thread(self._write, channel, head[:FILE_HEADER_BYTES])
            head = head[FILE_HEADER_BYTES:]
            self._multifd = self._make_multifd(self._settings.multifd)
            saver = await self._multifd.connect(ram, self._guest, self._dialect)
        start = await self._on_thread(saver.setup_bytes)
        try:
            await self._on_thread(self._write, channel, head + start)
        except ChannelError:
            # As in QEMU, which writes through a buffer: the set-up was done, the rest is not.
            self._advance(Cause.STREAM)
            raise
        if self._link is not None:
            await self._link.set_up()
        self._setup_s = self._clock.monotonic_s()
        self._advance(Cause.STREAM)
        return saver

    def _make_multifd(self, settings: MultifdSettings) -> OutgoingMultifd:
        assert self._open_channel is not None
        return OutgoingMultifd(
            self._open_channel,
            settings,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=self._wait,
            should_stop=self._is_postcopy_requested,
            sent=self._sent_pages(),
        )

    async def _save_ram(self, saver: Saver) -> None:
        """Phase 2: every page once, for a held guest dirties none; or pass after pass."""
        live = self._guest.live
        if live is None:
            await self._on_thread(saver.save_all)
            return
        self._live_saver = self._make_live_saver(live, saver)
        await self._on_thread(self._live_saver.converge)
        await self._stop_guest(live)

    async def _stop_guest(self, live: Live) -> None:
        self._advance(None)
        self._switchover_s = self._clock.monotonic_s()
        self._stats.in_switchover = True
        # The guest stands still: what is left goes as fast as it can, as at QEMU.
        self._limiter.set_rate(0)
        self._was_running = live.is_running
        if self._was_running:
            await self._on_thread(live.stop)
            self._observer.on_stopped()

    def _make_live_saver(self, live: Live, saver: Saver) -> LiveSaver:
        loop = asyncio.get_running_loop()

        def on_pass() -> None:
            loop.call_soon_threadsafe(self._observer.on_pass, self._stats.dirty_sync_count)

        return LiveSaver(
            saver,
            live,
            list(self._guest.ram),
            Convergence(self._settings.throttle),
            stats=self._stats,
            clock=self._clock,
            downtime_limit_s=lambda: self._downtime_limit_ms / 1000,
            available_bytes_per_s=lambda: self._available_bytes_per_s,
            on_pass=on_pass,
            wait=self._wait,
        )

    async def _begin_switchover(self, *, is_lazy: bool = False) -> None:
        """Put the hand-over on record; the next byte may be the one that moves the guest."""
        self._stats.dirty_sync_count += 1
        if self._guest.live is None:
            self._observer.on_pass(self._stats.dirty_sync_count)
        self._switchover_s = self._switchover_s or self._clock.monotonic_s()
        self._stats.in_switchover = True
        self._guest.check_unchanged()
        settings = self._settings.postcopy
        lazy = LazyHandOver(settings.preempt, is_loaded=False) if settings and is_lazy else None
        await self._observer.before_switchover(lazy)
        self._advance(Cause.SWITCHOVER)

    async def _switch_over(self, channel: Channel, saver: Saver) -> None:
        """Phase 3: the guest leaves with its devices."""
        if self._live_saver is not None and self._guest.live is not None:
            await self._on_thread(self._live_saver.finish)
            await self._on_thread(self._save_devices, self._guest.live)
        end = await self._on_thread(saver.end_bytes)
        tail = stream_tail(self._guest, self._dialect, end)
        await self._on_thread(self._write_tail, channel, tail)

    async def _save_file(self, channel: Channel, settings: FileSettings) -> None:
        """The same phases into a mapped-ram file."""
        save = FileSave(
            channel,
            self._guest,
            self._dialect,
            settings,
            uuid=self._settings.uuid,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=self._wait,
        )
        self._stats.dirty_sync_count = 1
        await self._on_thread(save.set_up)
        self._setup_s = self._clock.monotonic_s()
        self._advance(Cause.STREAM)
        if (live := self._guest.live) is not None:
            # A page has one place: what stands still needs one pass.
            self._stats.dirty_sync_count += 1
            self._observer.on_pass(self._stats.dirty_sync_count)
            await self._stop_guest(live)
        await self._on_thread(save.save_ram)
        await self._pause_before_switchover()
        await self._begin_switchover()
        if live is not None:
            await self._on_thread(self._save_devices, live)
        self._tail_started.set()
        await self._on_thread(save.switch_over)

    def _save_devices(self, live: Live) -> None:
        live.save_devices(was_running=self._was_running)

    async def _on_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a step on the sending thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    async def _pause_before_switchover(self) -> None:
        if self._settings.pause_before_switchover:
            self._advance(Cause.PAUSE_BEFORE_SWITCHOVER)
            await self._continue.wait()

    def _advance(self, cause: Cause | None) -> None:
        """Go on to the next status, if there is one, unless the migration was cancelled."""
        if self._stop.is_set():
            raise MigrationCancelled("cancelled")
        if cause is not None:
            self._status.advance(cause)

    def _write(self, channel: Channel, data: bytes) -> None:
        channel.send(data)
        self._stats.sent(len(data))

    def _write_tail(self, channel: Channel, data: bytes) -> None:
        self._tail_started.set()
        if self._link is not None:
            self._link.set_ending()
        self._write(channel, data)

    def _wait(self, delay_s: float) -> None:
        """Wait for the bandwidth limit; runs on the outgoing thread."""
        if self._stop.wait(delay_s):
            raise MigrationCancelled("cancelled")

    async def _complete(self) -> None:
        self._end_s = self._clock.monotonic_s()
        self._stats.finish(self._end_s - self._start_s)
        self._package_loaded()
        if self._postcopy is not None:
            self._postcopy.log_requests()
            self._observer.on_learned(self._postcopy.learn())
        await self._observer.handed_over()
        self._status.advance(Cause.COMPLETE)

    def _interrupt(self) -> None:
        self._stop.set()
        self._continue.set()
        for end in (self._channel, self._multifd):
            if end is not None:
                end.shutdown()
        is_connecting = self._multifd is not None and self._multifd.is_connecting
        if self._work is not None and (self._channel is None or is_connecting):
            self._work.cancel()

    def _warn_of_two_owners(self) -> None:
        if self._tail_started.is_set():
            log.warning(
                "the whole guest was on its way when the migration ended without the "
                "destination's word: the destination may run it; do not run both"
            )

    async def _settle_cancel(self) -> None:
        self._warn_of_two_owners()
        await self._observer.kept()
        self._status.advance(Cause.CLEANED_UP)
        log.info("migration cancelled")

    async def _settle_failure(self, error: MigrationdError) -> None:
        self._error = error
        log.error("migration failed: %s", error)
        self._warn_of_two_owners()
        if self._status.can(Cause.FAIL):
            self._status.advance(Cause.FAIL)
        await self._observer.kept()
        self._status.advance(Cause.CLEANED_UP)


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))

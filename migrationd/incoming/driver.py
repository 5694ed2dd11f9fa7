"""The destination side: listen, load, acknowledge. The only place with this order.

    setup             a listener is open (or a file, pipe or descriptor)
    active            the first bytes of the stream were read
    postcopy-device   the device state has come before the rest of the memory
    postcopy-active   the source has given the guest up and sends the rest
    postcopy-paused   it cannot: its channels are lost; migrate-recover lets it in again
    postcopy-recover  it is back, and told what is missing
    completed         the guest is held (durably, if it rests in a file), then SHUT 0 is sent
    failed            anything else; SHUT 1 is sent if the return path is open

Reference: QEMU's destination; sequences in stream format 6.1-6.6.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from migrationd.codec.return_path import Shut
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import (
    ChannelClosed,
    ChannelError,
    MigrationdError,
    MigrationError,
    StreamTruncated,
    StreamUnsupported,
    WorkloadGone,
)
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.incoming.arrival import identity_of
from migrationd.incoming.berth import Berth, IncomingSettings
from migrationd.incoming.channels import IncomingChannels
from migrationd.incoming.colo import Replica
from migrationd.incoming.cpr import CprArrival
from migrationd.incoming.guest_load import GuestLoad
from migrationd.incoming.lazy_run import LazyRun
from migrationd.incoming.loader import Pause, StreamLoader
from migrationd.incoming.multifd_receive import MultifdReceiver
from migrationd.incoming.postcopy import PostcopyArrival
from migrationd.incoming.preempt import PreemptReceiver
from migrationd.incoming.recovery import RecoveryDoor
from migrationd.incoming.return_path import ReturnPath
from migrationd.incoming.urgent_pages import UrgentPages
from migrationd.migration.blocktime import Blocktime, with_blocktime
from migrationd.migration.dialect import dialect_of
from migrationd.migration.info import MigrationInfo
from migrationd.migration.status import Cause, Role, StatusMachine
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener

log = logging.getLogger(__name__)

_AT_END = ("completed", "failed")
_CAN_PAUSE = ("postcopy-active", "postcopy-recover")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class IncomingMigration:
    """One incoming migration, from its listener to a held guest.

    Runs on the event loop; loading steps run in an executor thread of its own.

    Args:
        berth: Where the guest goes.
        settings: Read when the stream begins, so that capabilities may be set while listening.
        on_status: Called with each new status.
        on_whole: Given the guest before the migration counts as completed.
        cpr: How its memory comes before the stream, if it does.
        on_running: Given a guest that may run before its memory is there; lets it run.
        on_colo_exit: Called with the reason when a replica does not follow its primary any more.
    """

    def __init__(
        self,
        berth: Berth,
        settings: Callable[[], IncomingSettings],
        on_status: Callable[[str], None],
        on_whole: Callable[[HeldGuest], Awaitable[None]] | None = None,
        cpr: CprArrival | None = None,
        on_running: Callable[[AttachedGuest], Awaitable[None]] | None = None,
        on_colo_exit: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._on_colo_exit = on_colo_exit
        self._berth = berth
        self._cpr = cpr
        self._on_whole = on_whole
        self._on_running = on_running
        self._loss: WorkloadGone | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._settings_now = settings
        self._settings = IncomingSettings()
        self._status = StatusMachine(Role.INCOMING, on_status)
        self._error: MigrationdError | None = None
        self._listener: Listener | None = None
        self._channels: IncomingChannels | None = None
        self._return_path = ReturnPath()
        self._loading: GuestLoad | None = None
        self._multifd: MultifdReceiver | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="incoming")
        self._preempt: PreemptReceiver | None = None
        self._door = RecoveryDoor()
        self._is_pause_wanted = False
        self._failover = asyncio.Event()

    @property
    def status(self) -> str:
        """Incoming MigrationStatus."""
        return self._status.status

    @property
    def error(self) -> MigrationdError | None:
        """Why it failed, or stands still."""
        return self._error

    @property
    def owns_guest(self) -> bool:
        """Whether the source has given the guest up, which may still lack memory."""
        return self._loading is not None and self._loading.postcopy.owns_guest

    def info(self) -> MigrationInfo | None:
        """The destination's part of ``query-migrate``; None before anything happened."""
        if self.status == "none":
            return None
        addresses: tuple[dict[str, object], ...] = ()
        listener = self._door.listener or self._listener
        if listener is not None and self.status not in _AT_END:
            addresses = tuple(listener.qapi_addresses())
        info = MigrationInfo(
            status=self.status,
            error_desc=self._error_text(),
            socket_address=addresses,
        )
        if not self._settings.postcopy_blocktime or self.status != "completed":
            return info
        lazy = self._loading.lazy if self._loading is not None else None
        blocktime = lazy.blocktime if lazy is not None else None
        if blocktime is None and self.owns_guest:
            blocktime = Blocktime()  # a parked guest never waits
        return info if blocktime is None else with_blocktime(info, blocktime)

    def _error_text(self) -> str | None:
        if self.status == "failed":
            return f"load of migration failed: {self._error}"
        # A lost connection is a pause, as at QEMU, and no more; anything else must be told.
        is_lost = isinstance(self._error, ChannelError | StreamTruncated)
        is_told = self.status == "postcopy-paused" and not is_lost
        return str(self._error) if is_told and self._error is not None else None

    def begin(self) -> None:
        """Enter ``setup``.

        Raises:
            InvalidState: An earlier incoming migration was begun here.
        """
        self._status.advance(Cause.START)

    def listen_on(self, listener: Listener) -> None:
        """Say where the source will come from; the listener is closed by :meth:`run`."""
        self._listener = listener

    @property
    def is_running(self) -> bool:
        """Whether it waits for a guest or loads one; not where nothing could be opened."""
        return self._listener is not None and self._status.is_running

    def yank(self) -> None:
        """Cut the connections off; without one there is nothing to cut."""
        if self._loading is not None and self._channels is not None:
            self._channels.shutdown()

    async def run(self) -> HeldGuest | None:
        """Accept the source and load its guest.

        Returns:
            The held guest, or None after a failure (see :attr:`error`).
        """
        listener = self._listener
        assert listener is not None
        self._channels = IncomingChannels(listener)
        try:
            if self._cpr is not None:
                await self._cpr.arrive()
            loading = await self._connect(self._channels)
            if self._settings.mapped_ram:
                self._stream_began()
                guest = await self._on_thread(loading.load_file, self._main())
            else:
                guest = await self._receive(loading)
            if self._settings.colo:
                await self._follow(guest, loading.loader)
            if self._on_whole is not None:
                await self._on_whole(guest)
            self._status.advance(Cause.COMPLETE)
            return guest
        except MigrationdError as error:
            await self._fail(error)
            return None
        except asyncio.CancelledError:
            if self.owns_guest:
                log.error("a guest that its source has given up is abandoned before it was whole")
            await self._abandon()
            raise
        except Exception as error:  # a defect of ours must end as a failed migration
            log.error("internal error in the incoming migration", exc_info=error)
            await self._fail(MigrationError(f"internal error: {error!r}"))
            return None
        finally:
            self._door.close()
            await self._close_channels()
            if self._cpr is not None:
                self._cpr.release()
            self._executor.shutdown(wait=True)

    async def _follow(self, guest: HeldGuest, loader: StreamLoader) -> None:
        """Follow the primary until the user says that the replica is to take over."""
        assert isinstance(guest, ParkedGuest)
        replica = Replica(self._main(), guest, loader.decoder)
        self._status.advance(Cause.REPLICATE)
        reason = "error"
        try:
            await self._on_thread(replica.follow)
        except MigrationdError as error:
            reason = "request" if self._failover.is_set() else "error"
            if reason == "error":
                self._error = error
                log.error("the primary is lost: %s", error)
        if self._channels is not None:
            self._channels.shutdown()
        self._on_colo_exit(reason)
        await self._failover.wait()
        log.info("the replica takes over, from checkpoint %d", replica.checkpoints)

    def fail_over(self) -> None:
        """``x-colo-lost-heartbeat``: the replica is the guest from now on; only in ``colo``."""
        self._failover.set()
        if self._channels is not None:
            self._channels.shutdown()

    def recover_on(self, listener: Listener) -> None:
        """``migrate-recover``: let the source in here, and nowhere else any more."""
        self._door.open(listener)

    def pause(self) -> bool:
        """``migrate-pause``: end the channels of a postcopy.

        Returns:
            False if there is none, or none that is connected.
        """
        if self.status not in _CAN_PAUSE or self._channels is None:
            return False
        self._is_pause_wanted = True
        self._channels.shutdown()
        return True

    async def _connect(self, channels: IncomingChannels) -> GuestLoad:
        """Phase 1: every connection that the source makes before it sends pages."""
        await channels.accept_first()
        settings = self._settings = self._settings_now()
        loop = self._loop = asyncio.get_running_loop()
        main = self._return_path.channel = await channels.gather(
            multifd=settings.multifd_channels,
            expects_preempt=settings.postcopy_preempt,
            uuid=settings.guest_uuid,
        )
        if settings.multifd_channels:
            self._multifd = MultifdReceiver(channels.multifd, settings.multifd_compression)
        loader = StreamLoader(
            main,
            StreamDecoder(StreamLimits(ram_bytes=settings.ram_limit_bytes)),
            lambda: loop.call_soon_threadsafe(self._stream_began),
            self._multifd,
            settings.bitmap_mapping,
        )
        postcopy = PostcopyArrival(
            takes_ram=settings.postcopy_ram,
            answer=self._return_path.answer,
            report=self._report,
        )
        loading = self._loading = GuestLoad(
            settings=settings,
            berth=self._berth,
            loader=loader,
            return_path=self._return_path,
            postcopy=postcopy,
            multifd=self._multifd,
            source_uuid=channels.source_uuid,
            lazy_run=lambda guest: self._lazy_run(guest, postcopy),
        )
        self._await_preempt(channels, loader)
        return loading

    async def _receive(self, loading: GuestLoad) -> HeldGuest:
        """Phases 2 and 3, again after each loss of a postcopy's channels."""
        postcopy = loading.postcopy
        failure: MigrationdError | None = None
        while True:
            try:
                if failure is not None:
                    await self._let_in_again(loading)
                await self._load(loading)
                return await self._on_thread(loading.finish)
            except Exception as error:
                if loading.lazy is not None:
                    await asyncio.to_thread(loading.lazy.give_up)
                    if loading.lazy.error is not None:
                        raise loading.lazy.error from error
                if self._loss is not None:
                    raise self._loss from error
                if not postcopy.owns_guest or isinstance(error, WorkloadGone):
                    raise  # its socket may say so later than its memory
                if isinstance(error, MigrationdError):
                    failure = error
                else:
                    log.error("internal error in postcopy", exc_info=error)
                    failure = MigrationError(f"internal error: {error!r}")
            if not postcopy.has_ram:
                # Nothing but dirty bitmaps came by postcopy: the guest is whole.
                log.warning("dirty bitmaps are lost with their connection: %s", failure)
                return await self._on_thread(loading.finish)
            await self._stand_still(loading, failure)

    async def _load(self, loading: GuestLoad) -> None:
        """Phase 2: the stream, until the guest is whole."""
        while await self._on_thread(loading.go_on) is not Pause.FINISHED:
            pass
        if self._multifd is not None:
            await self._on_thread(self._multifd.finish)
        if self._preempt is not None:
            machine = identity_of(loading.loader.arrival, None).machine
            await self._preempt.finish(sends_eos=dialect_of(machine).preempt_eos)

    def _await_preempt(self, channels: IncomingChannels, loader: StreamLoader) -> None:
        if self._settings.postcopy_preempt:
            self._preempt = PreemptReceiver(
                channels.accept_preempt,
                lambda: (loader.fork_ram(), tuple(loader.blocks)),
                channels.shutdown,
                self._serve_urgent,
            )

    def _serve_urgent(self, pages: UrgentPages) -> None:
        lazy = self._loading.lazy if self._loading is not None else None
        if lazy is not None:
            lazy.serve(pages)

    async def _stand_still(self, loading: GuestLoad, error: MigrationdError) -> None:
        """Give the channels of a postcopy up, and nothing else."""
        if loading.lazy is not None:
            loading.lazy.disconnect()
        if self._is_pause_wanted:
            error = ChannelClosed("Postcopy migration is paused by the user")
        elif self._preempt is not None and self._preempt.error is not None:
            error = self._preempt.error
        self._is_pause_wanted = False
        await self._close_channels()
        self._error = error
        assert loading.guest is not None
        log.warning(
            "postcopy is paused: %s; %d pages are missing; migrate-recover lets the source in",
            error,
            sum(block.missing_count for block in loading.guest.ram),
        )
        self._status.advance(Cause.PAUSE)

    async def _let_in_again(self, loading: GuestLoad) -> None:
        channels = self._channels = await self._door.enter()
        self._status.advance(Cause.RECOVER)
        loading.postcopy.recover()
        main = self._return_path.channel = await channels.gather(
            expects_preempt=self._settings.postcopy_preempt
        )
        if not main.is_duplex:
            raise StreamUnsupported("a recovery needs a way back", hint="use tcp: or unix:")
        loading.loader.resume(main)
        self._await_preempt(channels, loading.loader)

    async def _close_channels(self) -> None:
        preempt, self._preempt = self._preempt, None
        multifd, self._multifd = self._multifd, None
        if self._channels is not None:
            self._channels.shutdown()
        if multifd is not None:
            await asyncio.to_thread(multifd.stop)
        if preempt is not None:
            await preempt.stop()
        if self._channels is not None:
            self._channels.close()

    async def _on_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a step on the loading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    def _stream_began(self) -> None:
        if self._status.can(Cause.STREAM):
            self._status.advance(Cause.STREAM)

    def _main(self) -> Channel:
        assert self._return_path.channel is not None
        return self._return_path.channel

    def _report(self, cause: Cause) -> None:
        lazy = self._loading.lazy if self._loading is not None else None
        if cause is Cause.RECOVERED and lazy is not None:
            lazy.connect()
        self._loop.call_soon_threadsafe(self._status.advance, cause)

    def _lazy_run(self, guest: AttachedGuest, postcopy: PostcopyArrival) -> LazyRun:
        assert self._on_running is not None
        return LazyRun(
            guest,
            self._return_path.send,
            postcopy.commit,
            self._on_running,
            self._break_off,
            self._loop,
        )

    def _break_off(self, error: MigrationdError) -> None:
        """A guest cannot be loaded: say so and end; on any thread."""
        log.error("the guest cannot run here: %s", error)
        with contextlib.suppress(ChannelError):
            self._return_path.answer(Shut(1))
        if self._channels is not None:
            self._channels.shutdown()

    def has_begun(self, guest: HeldGuest) -> bool:
        """Whether it loads this guest now."""
        is_here = self._loading is not None and self._loading.guest is guest
        return is_here and self._status.is_running

    def guest_gone(self) -> None:
        """The workload that takes the guest is gone: there is nothing left to wait for."""
        self._loss = WorkloadGone()
        self._door.give_up(self._loss)
        if self._channels is not None:
            self._farewell = asyncio.create_task(self._refuse(self._channels))

    async def _refuse(self, channels: IncomingChannels) -> None:
        """Tell the source, which then knows that its guest does not run here, and hang up."""
        if not self.owns_guest:
            await self._return_path.answer_last(Shut(1))
        channels.shutdown()

    async def _fail(self, error: MigrationdError) -> None:
        self._error = error
        log.error("load of migration failed: %s", error)
        if self._farewell is None:
            await self._return_path.answer_last(Shut(1))
        else:
            await self._farewell
        await self._abandon()
        self._status.advance(Cause.FAIL)

    async def _abandon(self) -> None:
        if self._channels is not None:
            self._channels.shutdown()
        if self._multifd is not None:
            await asyncio.shield(asyncio.to_thread(self._multifd.stop))
        guest, lazy = self._loading.let_go() if self._loading is not None else (None, None)
        if lazy is not None:
            await asyncio.shield(asyncio.to_thread(lazy.abandon))
        await asyncio.shield(self._on_thread(self._berth.abandon))
        if guest is not None:
            guest.close()

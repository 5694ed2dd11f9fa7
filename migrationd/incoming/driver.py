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
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from migrationd.codec.constants import (
    MIG_CMD_ENABLE_COLO,
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PACKAGED,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_POSTCOPY_LISTEN,
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    MIG_CMD_POSTCOPY_RESUME,
    MIG_CMD_POSTCOPY_RUN,
    MIG_CMD_RECV_BITMAP,
    MIG_CMD_SWITCHOVER_START,
)
from migrationd.codec.records import Command, Configuration, Package, RamBlockList
from migrationd.codec.return_path import (
    Pong,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
    encode_return_path,
)
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import (
    ChannelClosed,
    ChannelError,
    GuestError,
    MigrationdError,
    MigrationError,
    StreamCorrupt,
    StreamTruncated,
    StreamUnsupported,
)
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock
from migrationd.incoming.arrival import (
    check_configuration,
    check_uuid,
    complete,
    identity_of,
    specs_of,
)
from migrationd.incoming.berth import Berth, IncomingSettings
from migrationd.incoming.channels import IncomingChannels
from migrationd.incoming.colo import Replica
from migrationd.incoming.cpr import CprArrival
from migrationd.incoming.lazy_run import LazyRun
from migrationd.incoming.loader import Barrier, Pause, StreamLoader
from migrationd.incoming.mapped_ram import load_mapped_ram
from migrationd.incoming.multifd_receive import MultifdReceiver
from migrationd.incoming.postcopy import PostcopyArrival
from migrationd.incoming.preempt import PreemptReceiver
from migrationd.incoming.recovery import RecoveryDoor
from migrationd.migration.blocktime import Blocktime, with_blocktime
from migrationd.migration.dialect import dialect_of
from migrationd.migration.info import MigrationInfo
from migrationd.migration.status import Cause, Role, StatusMachine
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener

log = logging.getLogger(__name__)

_POSTCOPY_COMMANDS = frozenset(
    (
        MIG_CMD_POSTCOPY_ADVISE,
        MIG_CMD_POSTCOPY_LISTEN,
        MIG_CMD_POSTCOPY_RAM_DISCARD,
        MIG_CMD_POSTCOPY_RESUME,
        MIG_CMD_POSTCOPY_RUN,
        MIG_CMD_RECV_BITMAP,
    )
)
_FAREWELL_S = 1.0
_AT_END = ("completed", "failed")
_CAN_PAUSE = ("postcopy-active", "postcopy-recover")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class IncomingMigration:
    """One incoming migration, from its listener to a held guest.

    Runs on the event loop; loading steps run in an executor thread of its own.

    Args:
        listener: Open listener; closed here.
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
        self._lazy: LazyRun | None = None
        self._loss: GuestError | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._answering = threading.Lock()
        self._settings_now = settings
        self._settings = IncomingSettings()
        self._status = StatusMachine(Role.INCOMING, on_status)
        self._error: MigrationdError | None = None
        self._listener: Listener | None = None
        self._channels: IncomingChannels | None = None
        self._channel: Channel | None = None
        self._multifd: MultifdReceiver | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="incoming")
        self._postcopy: PostcopyArrival | None = None
        self._preempt: PreemptReceiver | None = None
        self._door = RecoveryDoor()
        self._is_pause_wanted = False
        self._return_path_open = False
        self._failover = asyncio.Event()
        self._guest: HeldGuest | None = None

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
        return self._postcopy is not None and self._postcopy.owns_guest

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
        blocktime = self._lazy.blocktime if self._lazy is not None else None
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
        if self._channel is not None and self._channels is not None:
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
            loader = await self._connect(self._channels)
            guest = await (
                self._take_file() if self._settings.mapped_ram else self._receive(loader)
            )
            if self._settings.colo:
                await self._follow(guest, loader)
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

    async def _connect(self, channels: IncomingChannels) -> StreamLoader:
        """Phase 1: every connection that the source makes before it sends pages."""
        await channels.accept_first()
        settings = self._settings = self._settings_now()
        loop = self._loop = asyncio.get_running_loop()
        self._postcopy = PostcopyArrival(
            takes_ram=settings.postcopy_ram, answer=self._answer, report=self._report
        )
        self._channel = await channels.gather(
            multifd=settings.multifd_channels,
            expects_preempt=settings.postcopy_preempt,
            uuid=settings.guest_uuid,
        )
        if settings.multifd_channels:
            self._multifd = MultifdReceiver(channels.multifd, settings.multifd_compression)
        loader = StreamLoader(
            self._channel,
            StreamDecoder(StreamLimits(ram_bytes=settings.ram_limit_bytes)),
            lambda: loop.call_soon_threadsafe(self._stream_began),
            self._multifd,
            settings.bitmap_mapping,
        )
        self._await_preempt(channels, loader)
        return loader

    async def _take_file(self) -> HeldGuest:
        """Phases 2 and 3 of a mapped-ram file."""
        self._stream_began()
        self._guest = await self._on_thread(self._load_file, self._main())
        await self._on_thread(self._acknowledge, self._guest)
        return self._guest

    async def _receive(self, loader: StreamLoader) -> HeldGuest:
        """Phases 2 and 3, again after each loss of a postcopy's channels."""
        postcopy = self._postcopy
        assert postcopy is not None
        failure: MigrationdError | None = None
        while True:
            try:
                if failure is not None:
                    await self._let_in_again(loader, postcopy)
                await self._load(loader)
                return await self._settle(loader)
            except Exception as error:
                if self._lazy is not None:
                    await asyncio.to_thread(self._lazy.give_up)
                    if self._lazy.error is not None:
                        raise self._lazy.error from error
                if self._loss is not None:
                    raise self._loss from error
                if not postcopy.owns_guest:
                    raise
                if isinstance(error, MigrationdError):
                    failure = error
                else:
                    log.error("internal error in postcopy", exc_info=error)
                    failure = MigrationError(f"internal error: {error!r}")
            if not postcopy.has_ram:
                # Nothing but dirty bitmaps came by postcopy: the guest is whole.
                log.warning("dirty bitmaps are lost with their connection: %s", failure)
                return await self._settle(loader)
            await self._stand_still(failure)

    async def _load(self, loader: StreamLoader) -> None:
        """Phase 2: the stream, until the guest is whole."""
        while await self._on_thread(self._go_on, loader) is not Pause.FINISHED:
            pass
        if self._multifd is not None:
            await self._on_thread(self._multifd.finish)
        if self._preempt is not None:
            machine = identity_of(loader.arrival, None).machine
            await self._preempt.finish(sends_eos=dialect_of(machine).preempt_eos)

    def _go_on(self, loader: StreamLoader) -> Pause:
        """Load until there is a reason to look up; runs on the loading thread."""
        while not isinstance(result := loader.step(), Pause):
            self._pass_barrier(loader, result)
        return result

    async def _settle(self, loader: StreamLoader) -> HeldGuest:
        """Phase 3: the guest is safe here; the source may forget it."""
        return await self._on_thread(self._finish, loader)

    def _finish(self, loader: StreamLoader) -> HeldGuest:
        guest = self._complete(loader)
        if self._settings.colo and (not isinstance(guest, ParkedGuest) or guest.file is not None):
            raise StreamUnsupported(
                "a replica is held in memory", hint="start without -ram-dir and -guest"
            )
        self._acknowledge(guest)
        return guest

    def _await_preempt(self, channels: IncomingChannels, loader: StreamLoader) -> None:
        if self._settings.postcopy_preempt:
            self._preempt = PreemptReceiver(
                channels.accept_preempt,
                lambda: (loader.fork_ram(), tuple(loader.blocks)),
                channels.shutdown,
            )

    async def _stand_still(self, error: MigrationdError) -> None:
        """Give the channels of a postcopy up, and nothing else."""
        if self._lazy is not None:
            self._lazy.disconnect()
        if self._is_pause_wanted:
            error = ChannelClosed("Postcopy migration is paused by the user")
        elif self._preempt is not None and self._preempt.error is not None:
            error = self._preempt.error
        self._is_pause_wanted = False
        await self._close_channels()
        self._error = error
        guest = self._guest
        assert guest is not None
        log.warning(
            "postcopy is paused: %s; %d pages are missing; migrate-recover lets the source in",
            error,
            sum(block.missing_count for block in guest.ram),
        )
        self._status.advance(Cause.PAUSE)

    async def _let_in_again(self, loader: StreamLoader, postcopy: PostcopyArrival) -> None:
        channels = self._channels = await self._door.enter()
        self._status.advance(Cause.RECOVER)
        postcopy.recover()
        main = self._channel = await channels.gather(
            expects_preempt=self._settings.postcopy_preempt
        )
        if not main.is_duplex:
            raise StreamUnsupported("a recovery needs a way back", hint="use tcp: or unix:")
        loader.resume(main)
        self._await_preempt(channels, loader)

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

    def _load_file(self, channel: Channel) -> HeldGuest:
        return load_mapped_ram(
            channel,
            self._berth.adopt,
            ram_limit_bytes=self._settings.ram_limit_bytes,
            mapping=self._settings.bitmap_mapping,
            check=lambda record: check_uuid(record, self._settings.guest_uuid, 0),
        )

    def _stream_began(self) -> None:
        if self._status.can(Cause.STREAM):
            self._status.advance(Cause.STREAM)

    def _pass_barrier(self, loader: StreamLoader, record: Barrier) -> None:
        """Handle a record in order; runs on the loading thread."""
        match record:
            case Configuration():
                check_configuration(
                    record,
                    self._settings.guest_uuid,
                    loader.position,
                    ignores_shared=self._settings.ignores_shared,
                )
                loader.arrival.configuration = record
            case RamBlockList():
                loader.use_blocks(self._allocate(loader, record))
            case Command():
                self._obey(record, loader)
            case Package():
                assert self._postcopy is not None
                self._postcopy.unpack(record, loader)

    def _allocate(self, loader: StreamLoader, blocks: RamBlockList) -> tuple[RamBlock, ...]:
        arrival = loader.arrival
        identity = identity_of(arrival, self._channels.source_uuid if self._channels else None)
        specs = specs_of(blocks, loader.page_size)
        self._guest = self._berth.allocate(identity, tuple(arrival.devices), specs)
        is_ready = self._guest.live is not None and self._return_path_open
        if is_ready and self._settings.switchover_ack:
            self._answer(SwitchoverAck())  # it has accepted the declarations, and has the memory
        assert self._postcopy is not None
        self._postcopy.prepare(self._guest.ram)
        if self._settings.ignores_shared:
            for block in self._guest.ram:
                block.track_received()
        if self._postcopy.has_ram and isinstance(self._guest, AttachedGuest):
            self._expect_lazy(self._guest, self._postcopy, loader)
        if self._multifd is not None:
            self._multifd.start(self._guest.ram, loader.page_size)
        return self._guest.ram

    def _main(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def _answer(self, message: ReturnPathMessage) -> None:
        self._send_back(encode_return_path(message))

    def _send_back(self, data: bytes) -> None:
        """Send whole messages on the return path, from any thread."""
        channel = self._main()
        with self._answering:
            if channel.is_socket:
                channel.send_parts((data,))
            else:
                channel.send(data)

    def _report(self, cause: Cause) -> None:
        if cause is Cause.RECOVERED and self._lazy is not None:
            self._lazy.connect()
        self._loop.call_soon_threadsafe(self._status.advance, cause)

    def _expect_lazy(
        self, guest: AttachedGuest, postcopy: PostcopyArrival, loader: StreamLoader
    ) -> None:
        """Make ready for a guest that runs before its memory is there."""
        assert self._on_running is not None
        LazyRun.prepare(guest)
        lazy = LazyRun(
            guest, self._send_back, postcopy.commit, self._on_running, self._break_off, self._loop
        )
        postcopy.launch = lambda pings: lazy.launch(loader.arrival.devices, pings)
        self._lazy = lazy

    def _break_off(self, error: MigrationdError) -> None:
        """A guest cannot be loaded: say so and end; on any thread."""
        log.error("the guest cannot run here: %s", error)
        with contextlib.suppress(ChannelError):
            self._answer(Shut(1))
        if self._channels is not None:
            self._channels.shutdown()

    def has_begun(self, guest: HeldGuest) -> bool:
        """Whether it loads this guest now."""
        return self._guest is guest and self._status.is_running

    def guest_gone(self) -> None:
        """The workload that takes the guest is gone: there is nothing left to wait for."""
        self._loss = GuestError("the workload is gone")
        self._door.give_up(self._loss)
        if self._channels is not None:
            self._farewell = asyncio.create_task(self._refuse(self._channels))

    async def _refuse(self, channels: IncomingChannels) -> None:
        """Tell the source, which then knows that its guest does not run here, and hang up."""
        if not self.owns_guest:
            await self._answer_last(Shut(1))
        channels.shutdown()

    def _obey(self, command: Command, loader: StreamLoader) -> None:
        assert self._postcopy is not None
        match command.number:
            case n if n == MIG_CMD_OPEN_RETURN_PATH:
                if not self._main().is_duplex:
                    raise StreamUnsupported(
                        "the source opens a return path, but this transport has none",
                        position=loader.position,
                        hint="turn the source's return-path capability off",
                    )
                self._return_path_open = True
                configuration = loader.arrival.configuration
                dialect = dialect_of(configuration.machine if configuration else None)
                if self._settings.switchover_ack and dialect.switchover_ack_at_once:
                    self._answer(SwitchoverAck())
            case n if n == MIG_CMD_PING:
                if not self._return_path_open:
                    raise StreamCorrupt("PING without a return path", position=loader.position)
                self._answer(Pong(int.from_bytes(command.payload, "big")))
            case n if n == MIG_CMD_SWITCHOVER_START:
                loader.arrival.has_switchover_start = True
            case n if n in _POSTCOPY_COMMANDS:
                # Dirty bitmaps can do without a way back.
                is_for_bitmaps = n == MIG_CMD_POSTCOPY_ADVISE and not command.payload
                if not self._return_path_open and not is_for_bitmaps:
                    raise StreamCorrupt("postcopy without a return path", position=loader.position)
                self._postcopy.obey(command, loader)
            case n if n == MIG_CMD_ENABLE_COLO and self._settings.colo:
                pass  # 11.1 does not even say it
            case n if n == MIG_CMD_PACKAGED:
                pass  # what it holds comes next
            case _:
                raise StreamUnsupported(
                    f"command {command.number} is not taken",
                    position=loader.position,
                    hint="the capability x-colo is off here",
                )

    def _complete(self, loader: StreamLoader) -> HeldGuest:
        if self._guest is None:
            raise StreamCorrupt("the stream has no RAM section", position=loader.position)
        if self._lazy is not None:
            self._lazy.finish()
        complete(self._guest, loader.arrival, by_postcopy=self.owns_guest)
        return self._guest

    def _acknowledge(self, guest: HeldGuest) -> None:
        self._berth.settle(guest)
        if not self._return_path_open:
            return
        try:
            self._answer(Shut(0))
        except ChannelError as error:
            if self.owns_guest:
                log.warning("the source left before it heard that the guest is whole: %s", error)
                return
            # The guest is whole, as it would be at a QEMU that already runs it: keep it.
            log.warning(
                "the source left before it heard that the guest arrived (%s): "
                "it may have resumed the guest; do not run both",
                error,
            )

    async def _fail(self, error: MigrationdError) -> None:
        self._error = error
        log.error("load of migration failed: %s", error)
        if self._farewell is None:
            await self._answer_last(Shut(1))
        else:
            await self._farewell
        await self._abandon()
        self._status.advance(Cause.FAIL)

    async def _answer_last(self, message: Shut) -> None:
        """Say how it ended to a source that listens, and to nobody for ever."""
        if not self._return_path_open:
            return
        try:
            await asyncio.wait_for(asyncio.to_thread(self._answer, message), _FAREWELL_S)
        except (ChannelError, TimeoutError) as failure:
            log.debug("SHUT %d was not sent: %s", message.value, failure)

    async def _abandon(self) -> None:
        if self._channels is not None:
            self._channels.shutdown()
        if self._multifd is not None:
            await asyncio.shield(asyncio.to_thread(self._multifd.stop))
        guest, self._guest = self._guest, None
        lazy, self._lazy = self._lazy, None
        if lazy is not None:
            await asyncio.shield(asyncio.to_thread(lazy.abandon))
        await asyncio.shield(self._on_thread(self._berth.abandon))
        if guest is not None:
            guest.close()

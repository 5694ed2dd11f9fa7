"""What the monitor's commands do: one guest, its migrations, its run state.

Implements :class:`migrationd.qmp.context.Control`. Everything here runs on the
event loop; migrations are tasks owned by this object.

Reference: order of checks and texts of QEMU 11.1 (``migrate``, ``migrate-incoming``,
``stop``, ``cont``).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from migrationd.clock import Clock
from migrationd.config import DaemonConfig
from migrationd.daemon.guest_socket import GuestSocket
from migrationd.daemon.incoming_control import IncomingControl
from migrationd.daemon.machine import Machine
from migrationd.daemon.outgoing_observer import MigrationEvents, OutgoingObserver
from migrationd.daemon.run_control import RunControl
from migrationd.daemon.settings import number, outgoing_settings
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.tls import MigrationTls
from migrationd.errors import GuestError, MigrationdError, QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import LazyHandOver, Owner
from migrationd.migration.dialect import dialect_of
from migrationd.migration.info import MigrationInfo
from migrationd.migration.options import MigrationOptions
from migrationd.migration.transports import check_mode, check_transport
from migrationd.objects.registry import ObjectRegistry
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.cpr import OpenChannel, after_hand_over
from migrationd.outgoing.driver import PAUSABLE, OutgoingMigration
from migrationd.outgoing.postcopy_source import PostcopySettings
from migrationd.qmp.context import Chardev, FdLookup, MigrationChannel
from migrationd.qmp.event_bus import EventBus
from migrationd.transport.address import Address, describe
from migrationd.transport.channel import Channel
from migrationd.transport.connect import connect, is_opened_now, open_now
from migrationd.transport.cpr_channel import CprSender

log = logging.getLogger(__name__)


class GuestControl:
    """The one guest of this process.

    Args:
        config: Start-up configuration.
        options: Capabilities and parameters.
        bus: Where events go.
        clock: Time.
        shelter: Where guests rest.
        on_quit: Called when the process is to end.
        on_fatal: Called when a failure, which was logged, ends the process with status 1.
        chardevs: Character devices of the monitors, by label.
    """

    def __init__(
        self,
        config: DaemonConfig,
        options: MigrationOptions,
        bus: EventBus,
        clock: Clock,
        shelter: Shelter,
        *,
        on_quit: Callable[[], None],
        on_fatal: Callable[[], None],
        chardevs: Mapping[str, Chardev] | None = None,
    ) -> None:
        self.options = options
        self.objects = ObjectRegistry()
        self._tls = MigrationTls(options, self.objects)
        self._config = config
        self._bus = bus
        self._clock = clock
        self._shelter = shelter
        self._on_quit = on_quit
        self._outgoing: OutgoingMigration | None = None
        self._leaving: set[HeldGuest] = set()
        self._guest_socket: GuestSocket | None = None
        self._tasks: set[asyncio.Future[None]] = set()
        self._run = RunControl(config, bus, shelter, self._spawn)
        self._events = MigrationEvents(bus, options)
        self.incoming = IncomingControl(
            config,
            options,
            shelter,
            self._run,
            self._events,
            self._tls,
            spawn=self._spawn,
            on_fatal=on_fatal,
        )
        self.machine = Machine(
            bus,
            clock,
            chardevs or {},
            shelter,
            guest=lambda: self._run.guest,
            migrations=lambda: (self._outgoing, self.incoming.migration),
            adopt=self.adopt,
            spawn=self._spawn,
        )

    @property
    def guest_name(self) -> str | None:
        """``-name``."""
        return self._config.name

    @property
    def guest_uuid(self) -> UUID | None:
        """``-uuid``, or what the guest came with."""
        if self._config.uuid is not None:
            return self._config.uuid
        raw = self._run.guest.identity.uuid if self._run.guest is not None else None
        return UUID(bytes=raw) if raw is not None else None

    @property
    def only_migratable(self) -> bool:
        """``-only-migratable``."""
        return self._config.only_migratable

    @property
    def run_state(self) -> str:
        """QMP RunState."""
        return self._run.run_state(is_arriving=self.incoming.owns_guest)

    @property
    def running(self) -> bool:
        """Whether the guest executes here: a parked one never does."""
        return self._run.running

    @property
    def guest(self) -> HeldGuest | None:
        """The held guest."""
        return self._run.guest

    def find_saved(self) -> ParkedGuest | None:
        """The guest that rests in the directory.

        Raises:
            StoreError: There is one, but it cannot be read.
        """
        return self._shelter.find()

    def adopt(self, guest: ParkedGuest) -> None:
        """Offer a guest that was found at rest, in place of the one that is held."""
        if self._run.guest is not None:
            self._run.guest.close()
        self._run.guest = guest
        self._run.expects_guest = False

    def adopt_lazy(self, guest: ParkedGuest, lazy: LazyHandOver) -> None:
        """Offer a guest whose postcopy an earlier daemon began: ``migrate`` resumes it."""
        self.adopt(guest)
        self._resume_lazy(guest, lazy)

    def _resume_lazy(self, guest: HeldGuest, lazy: LazyHandOver) -> None:
        self._run.in_switchover = True
        observer = OutgoingObserver(self._run, self._events, guest, "its destination", lazy)
        settings = replace(
            self._outgoing_settings(),
            postcopy=PostcopySettings(
                preempt=lazy.preempt, is_loaded=lazy.is_loaded, is_clone=self._config.keep
            ),
        )
        dialect = dialect_of(guest.identity.machine, guest.seen)
        self._outgoing = OutgoingMigration(guest, dialect, settings, self._clock, observer)
        self._carry(self._outgoing, guest, None)

    def open_guest_socket(self, path: str) -> None:
        """Listen for the workload of ``-guest attach``.

        Raises:
            MigrationdError: The path cannot be bound.
        """
        self._guest_socket = GuestSocket(path, self.attach, self.detached, self._config.tracking)

    async def attach(self, guest: AttachedGuest) -> None:
        """Take a workload that has just connected.

        Raises:
            GuestError: It does not obey.
        """
        if self._config.only_migratable and guest.blockers:
            raise GuestError(
                f"Device {guest.blockers[0]} is not migratable, but --only-migratable was specified"
            )
        awaits_source = self._run.guest is None and self._run.expects_guest
        note = guest.restore_owner()
        is_needed = note.lazy is not None and note.owner is Owner.HANDING_OVER
        if is_needed and awaits_source:
            raise GuestError(
                f"the workload's memory is still needed at {note.destination}: start its daemon "
                "without -incoming, and resume"
            )
        if awaits_source and guest.has_guest and note.owner is Owner.HELD:
            raise GuestError(
                "its memory is a guest's that is nowhere else: start its daemon without -incoming, "
                "or the workload anew to take another guest"
            )
        await asyncio.to_thread(guest.begin, is_destination=awaits_source)
        if self._config.start_stopped and not awaits_source and guest.is_running:
            await asyncio.to_thread(guest.stop)
            guest.never_ran = True
        self._shelter.slot.put(guest)
        if awaits_source:
            guest.owner = Owner.HELD
            return
        self._run.guest = guest
        if note.owner is not Owner.HELD:
            log.warning("the guest went to %s and must not run here", note.destination)
        if is_needed and note.lazy is not None:
            await asyncio.to_thread(guest.know_present)
            self._resume_lazy(guest, note.lazy)

    def detached(self, guest: AttachedGuest) -> None:
        """The workload is gone; what it was doing fails by itself."""
        self._shelter.slot.put(None)
        is_loading = self.incoming.lose(guest)
        if self._run.guest is guest:
            self._run.guest = None
            self._run.in_switchover = False
        if not is_loading and guest not in self._leaving:
            guest.close()

    def migrate(self, channels: Sequence[MigrationChannel], *, resume: bool, fds: FdLookup) -> None:
        """Start an outgoing migration; it goes on as a task.

        Raises:
            QMPError: The state forbids it.
            ChannelError: A file, command or descriptor cannot be opened.
        """
        address = next(item.address for item in channels if item.channel_type == "main")
        capabilities, parameters = self.options.capabilities, self.options.parameters
        check_transport(address, capabilities, parameters)
        cpr = next((item.address for item in channels if item.channel_type == "cpr"), None)
        if parameters["mode"] == "cpr-transfer" and cpr is None:
            raise QMPError("missing 'cpr' migration channel")
        if resume:
            self._resume(address, fds)
            return
        if self._outgoing is not None and self._outgoing.is_running:
            raise QMPError("There's a migration process in progress")
        guest = self._run.guest
        if guest is None:
            if self._run.expects_guest:
                raise QMPError("Guest is waiting for an incoming migration")
            raise QMPError("There is no guest to migrate: start with -incoming or a guest at rest")
        if self._shelter.is_replacing:
            raise QMPError("A snapshot is being loaded")
        if guest.owner is not Owner.HELD:
            raise QMPError("Can't migrate the vm that was paused due to previous migration")
        incoming = self.incoming.migration
        if incoming is not None and incoming.is_running:
            raise QMPError("Guest's memory is still on its way here")
        if blockers := self.machine.blockers:
            raise QMPError(f"State blocked by non-migratable device '{blockers[-1]}'")
        check_mode(capabilities, parameters)
        self.options.check_built()
        if not capabilities["x-ignore-shared"]:
            _check_has_all(guest)
        settings = self._outgoing_settings()
        if settings.hands_memory_over and self._config.keep:
            raise QMPError("A template (-keep) cannot give its memory away by cpr-transfer")
        migration = OutgoingMigration(
            guest,
            dialect_of(guest.identity.machine, guest.seen),
            settings,
            self._clock,
            OutgoingObserver(
                self._run,
                self._events,
                guest,
                describe(address),
                gives_memory=settings.hands_memory_over and guest.shares_memory,
                releases_memory=capabilities["release-ram"]
                and guest.file is None
                and not self._config.keep,
            ),
        )
        self._outgoing = migration
        migration.begin()
        try:
            keep = guest.file.identity if guest.file is not None else None
            open_channel = self._opener(address, fds, keep)
            if settings.hands_memory_over:
                assert cpr is not None
                open_channel = after_hand_over(guest, CprSender(cpr), open_channel)
        except MigrationdError as error:
            failure = error
            self._carry(migration, guest, lambda: _fail(failure))
            raise
        self._carry(migration, guest, open_channel)

    def _carry(
        self, migration: OutgoingMigration, guest: HeldGuest, open_channel: OpenChannel | None
    ) -> None:
        """Let a migration run; a workload that died on the way is let go behind it."""
        self._leaving.add(guest)

        async def run() -> None:
            try:
                await migration.run(open_channel)
            finally:
                self._leaving.discard(guest)
                if isinstance(guest, AttachedGuest) and self._run.guest is not guest:
                    guest.close()

        self._spawn(run())

    def _opener(self, address: Address, fds: FdLookup, keep: tuple[int, int] | None) -> OpenChannel:
        """What opens the main channel; what is opened at once is open when this returns."""
        if not is_opened_now(address):
            return self._tls.outgoing(lambda: connect(address), address)
        channel = open_now(address, fds, keep=keep)
        return self._tls.outgoing(lambda: _ready(channel), address)

    def _resume(self, address: Address, fds: FdLookup) -> None:
        if self._outgoing is None or self._outgoing.status != "postcopy-paused":
            raise QMPError("Cannot resume if there is no paused migration")
        self._outgoing.resume(self._opener(address, fds, None))

    def migrate_start_postcopy(self) -> None:
        """``migrate-start-postcopy``.

        Raises:
            QMPError: Postcopy is off, or nothing was migrated yet.
        """
        capabilities = self.options.capabilities
        if not (capabilities["postcopy-ram"] or capabilities["dirty-bitmaps"]):
            raise QMPError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self._outgoing is None:
            raise QMPError("Postcopy must be started after migration has been started")
        self._outgoing.start_postcopy()

    def migrate_pause(self) -> None:
        """``migrate-pause``.

        Raises:
            QMPError: There is nothing to pause.
        """
        if self._outgoing is not None and self._outgoing.status in PAUSABLE:
            self._outgoing.pause()
            return
        incoming = self.incoming.migration
        if incoming is not None and incoming.pause():
            return
        raise QMPError(
            "migrate-pause is currently only supported during postcopy-active or "
            "postcopy-recover state"
        )

    def migrate_cancel(self) -> None:
        """``migrate_cancel``: succeeds also when there is nothing to cancel.

        Raises:
            QMPError: The destination runs the guest.
        """
        if self._outgoing is not None:
            if self._outgoing.is_in_postcopy:
                raise QMPError("Postcopy migration in progress, cannot cancel.")
            self._outgoing.cancel()

    def migrate_continue(self, state: str) -> None:
        """``migrate-continue``.

        Raises:
            QMPError: The migration is in another state.
        """
        status = self._outgoing.status if self._outgoing is not None else "none"
        if self._outgoing is not None and status == "pre-switchover" == state:
            if not self._outgoing.is_continued:
                self._outgoing.continue_switchover()
                return
            status = "device"
        if status != state:
            raise QMPError(f"Migration not in expected state: {status}")

    @property
    def colo_mode(self) -> str:
        """Of ``query-colo-status``."""
        if self._outgoing is not None and self._outgoing.status == "colo":
            return "primary"
        incoming = self.incoming.migration
        is_secondary = incoming is not None and incoming.status == "colo"
        return "secondary" if is_secondary else "none"

    @property
    def colo_exit(self) -> tuple[str, str]:
        """Mode and reason of the last replica's end; "none" if there was none."""
        return self._events.colo_exited

    def colo_lost_heartbeat(self) -> None:
        """``x-colo-lost-heartbeat``: the side that hears it goes on alone.

        Raises:
            QMPError: No replica follows a guest.
        """
        match self.colo_mode:
            case "primary" if self._outgoing is not None:
                self._outgoing.give_up_replica()
            case "secondary" if self.incoming.migration is not None:
                self.incoming.migration.fail_over()
            case _:
                raise QMPError("VM is not in COLO mode")

    def check_capabilities_may_change(self) -> None:
        """Capabilities stay as they are while an outgoing migration runs.

        Raises:
            QMPError: One runs.
        """
        if self._outgoing is not None and self._outgoing.is_running:
            raise QMPError("There's a migration process in progress")

    def parameters_changed(self) -> None:
        """Make changed parameters take effect on a running migration."""
        if self._outgoing is not None:
            parameters = self.options.parameters
            self._outgoing.set_max_bandwidth(number(parameters["max-bandwidth"]))
            self._outgoing.set_downtime_limit(number(parameters["downtime-limit"]))
            self._outgoing.set_avail_switchover_bandwidth(
                number(parameters["avail-switchover-bandwidth"])
            )
            self._outgoing.set_xbzrle_cache_size(number(parameters["xbzrle-cache-size"]))
            self._outgoing.set_checkpoint_delay(number(parameters["x-checkpoint-delay"]))
            self._outgoing.set_max_postcopy_bandwidth(number(parameters["max-postcopy-bandwidth"]))

    def outgoing_info(self) -> MigrationInfo | None:
        """The source's part of ``query-migrate``."""
        return self._outgoing.info() if self._outgoing is not None else None

    async def stop(self) -> None:
        """Stop the guest; of a parked one, choose that it is stopped where it goes next.

        Raises:
            GuestError: A workload does not stop.
        """
        await self._run.stop()

    async def cont(self) -> None:
        """Let the guest run: a workload here, a parked one where it goes next.

        Takes a handed-over guest back.

        Raises:
            QMPError: The guest's state is just leaving.
            GuestError: A workload does not start.
        """
        if self._run.in_switchover:
            if self._outgoing is None or not self._outgoing.may_be_taken_back:
                raise QMPError("Migration is not finalized yet")
            log.warning("the guest is taken back: it must not run at the destination")
            self._outgoing.take_back()
            return
        await self._run.cont()

    def quit(self) -> None:
        """End the process; a running migration is cancelled on the way."""
        self._bus.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.machine.jobs.dismiss_all()
        self._cancel_outgoing()
        self._on_quit()

    async def aclose(self) -> None:
        """Cancel what is running and release the guest."""
        self._cancel_outgoing()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        guest = self._run.guest
        if isinstance(guest, AttachedGuest) and guest.owner is Owner.HANDED_OVER:
            await asyncio.to_thread(guest.end)
        if guest is not None:
            guest.close()
        if self._guest_socket is not None:
            await self._guest_socket.aclose()
        self.incoming.close()
        self._shelter.close()

    def _cancel_outgoing(self) -> None:
        if self._outgoing is not None:
            self._outgoing.cancel()

    def _outgoing_settings(self) -> OutgoingSettings:
        return outgoing_settings(
            self.options,
            self.guest_uuid,
            starts_postcopy_at_once=self._config.start_postcopy,
            is_clone=self._config.keep,
            compress_level=self._config.compress_level,
            learned=self._run.learned_order(),
        )

    def _spawn(self, work: "Coroutine[None, None, None] | asyncio.Future[None]") -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: "asyncio.Future[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error", exc_info=error)


async def _ready(channel: Channel) -> Channel:
    return channel


async def _fail(error: MigrationdError) -> Channel:
    raise error


def _check_has_all(guest: HeldGuest) -> None:
    for block in guest.ram:
        if block.is_elsewhere:
            raise QMPError(
                f"The memory of RAM block '{block.idstr}' is in a file that was shared with its "
                "source: turn x-ignore-shared on"
            )

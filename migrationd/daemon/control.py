"""What the monitor's commands do: one guest, its migrations, its run state.

Implements :class:`migrationd.qmp.context.Control`. Everything here runs on the
event loop; migrations are tasks owned by this object.

Reference: order of checks and texts of QEMU 11.1 (``stop``, ``cont``, ``migrate-pause``).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from uuid import UUID

from migrationd.clock import Clock
from migrationd.config import DaemonConfig
from migrationd.daemon.guest_socket import GuestSocket
from migrationd.daemon.incoming_control import IncomingControl
from migrationd.daemon.machine import Machine
from migrationd.daemon.outgoing_control import OutgoingControl
from migrationd.daemon.outgoing_observer import MigrationEvents
from migrationd.daemon.run_control import RunControl
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.tls import MigrationTls
from migrationd.errors import GuestError, QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import LazyHandOver, Owner
from migrationd.migration.options import MigrationOptions
from migrationd.objects.registry import ObjectRegistry
from migrationd.qmp.context import Chardev
from migrationd.qmp.event_bus import EventBus

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
        self._config = config
        self._bus = bus
        self._shelter = shelter
        self._on_quit = on_quit
        self._guest_socket: GuestSocket | None = None
        self._tasks: set[asyncio.Future[None]] = set()
        self._run = RunControl(config, bus, shelter, self._spawn)
        self._events = MigrationEvents(bus, options)
        tls = MigrationTls(options, self.objects)
        self.incoming = IncomingControl(
            config,
            options,
            shelter,
            self._run,
            self._events,
            tls,
            spawn=self._spawn,
            on_fatal=on_fatal,
        )
        self.outgoing = OutgoingControl(
            config,
            options,
            clock,
            shelter,
            self._run,
            self._events,
            tls,
            self.incoming,
            blockers=lambda: self.machine.blockers,
            uuid=lambda: self.guest_uuid,
            spawn=self._spawn,
        )
        self.machine = Machine(
            bus,
            clock,
            chardevs or {},
            shelter,
            guest=lambda: self._run.guest,
            migrations=lambda: (self.outgoing.migration, self.incoming.migration),
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
        self.outgoing.resume_lazy(guest, lazy)

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
            self.outgoing.resume_lazy(guest, note.lazy)

    def detached(self, guest: AttachedGuest) -> None:
        """The workload is gone; what it was doing fails by itself."""
        self._shelter.slot.put(None)
        is_needed = self.incoming.lose(guest) or self.outgoing.lose(guest)
        if self._run.guest is guest:
            self._run.guest = None
            self._run.switchover_over()
        if not is_needed:
            guest.close()

    def migrate_pause(self) -> None:
        """``migrate-pause``.

        Raises:
            QMPError: There is nothing to pause.
        """
        if self.outgoing.pause():
            return
        incoming = self.incoming.migration
        if incoming is not None and incoming.pause():
            return
        raise QMPError(
            "migrate-pause is currently only supported during postcopy-active or "
            "postcopy-recover state"
        )

    @property
    def colo_mode(self) -> str:
        """Of ``query-colo-status``."""
        outgoing = self.outgoing.migration
        if outgoing is not None and outgoing.status == "colo":
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
            case "primary" if self.outgoing.migration is not None:
                self.outgoing.migration.give_up_replica()
            case "secondary" if self.incoming.migration is not None:
                self.incoming.migration.fail_over()
            case _:
                raise QMPError("VM is not in COLO mode")

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
            self.outgoing.take_back()
            return
        await self._run.cont()

    def quit(self) -> None:
        """End the process; a running migration is cancelled on the way."""
        self._bus.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.machine.jobs.dismiss_all()
        self.outgoing.abort()
        self._on_quit()

    async def aclose(self) -> None:
        """Cancel what is running and release the guest."""
        self.outgoing.abort()
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

    def _spawn(self, work: "Coroutine[None, None, None] | asyncio.Future[None]") -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: "asyncio.Future[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error", exc_info=error)

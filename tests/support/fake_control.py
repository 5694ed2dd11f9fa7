"""A daemon without a guest, for tests of the monitor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.dirty_limit import DirtyLimiter
from migrationd.daemon.jobs import Jobs
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.snapshots import GuestSnapshots
from migrationd.errors import QMPError
from migrationd.migration.dirty_rate import DirtyRateRequest, DirtyRateState
from migrationd.migration.info import MigrationInfo
from migrationd.migration.options import MigrationOptions
from migrationd.objects.registry import ObjectRegistry
from migrationd.qmp.context import Chardev, DirtyRate, FdLookup, MemoryPart, MigrationChannel
from migrationd.qmp.event_bus import EventBus
from migrationd.transport.address import Address


@dataclass
class FakeChardev:
    """A monitor's socket."""

    filename: str = "unix:/run/fake.sock,server=on"
    is_socket: bool = True
    is_connected: bool = True
    is_pretty: bool = False

    def disconnect(self) -> None:
        """Only remember it."""
        self.is_connected = False


@dataclass
class FakeDirtyRate:
    """Remembers what it is to measure."""

    state: DirtyRateState = field(default_factory=DirtyRateState)

    def start(self, request: DirtyRateRequest) -> None:
        """It measures for ever."""
        self.state = DirtyRateState("measuring", 1000, request)


@dataclass
class FakeMachine:
    """Implements ``migrationd.qmp.context.Machine``; keeps what it was asked."""

    type_name: str | None = None
    base_memory_bytes: int = 0
    ram_bytes: int = 0
    is_migrating: bool = False
    is_migration_yankable: bool = False
    dirty_rate: DirtyRate = field(default_factory=FakeDirtyRate)
    dirty_limit: DirtyLimiter = field(
        default_factory=lambda: DirtyLimiter(SystemClock(), lambda: None, lambda _: None)
    )
    devices: dict[str, FakeChardev] = field(default_factory=dict)
    jobs: Jobs = field(default_factory=lambda: Jobs(EventBus(SystemClock()), lambda _: None))
    snapshots: GuestSnapshots = field(
        default_factory=lambda: GuestSnapshots(
            Shelter(DaemonConfig()), lambda: None, lambda: False, lambda _: None
        )
    )
    calls: list[str] = field(default_factory=list)
    blockers: tuple[str, ...] = ()
    memory: list[MemoryPart] = field(default_factory=list)

    async def reset(self) -> None:
        """Only remember it."""
        self.calls.append("reset")

    async def powerdown(self) -> None:
        """Only remember it."""
        self.calls.append("powerdown")

    async def save_devices(self, path: str) -> None:
        """Only remember it."""
        self.calls.append(f"save_devices {path}")

    async def load_devices(self, path: str) -> None:
        """Only remember it."""
        self.calls.append(f"load_devices {path}")

    def chardevs(self) -> Mapping[str, Chardev]:
        """Those of the test."""
        return self.devices

    def yank_migration(self) -> None:
        """Only remember it."""
        self.calls.append("yank_migration")


@dataclass
class FakeIncoming:
    """Implements ``migrationd.qmp.context.IncomingControl``; keeps what it was asked.

    Attributes:
        refusal: What ``migrate-incoming`` is told before its address is read.
        migration: Of ``query-migrate``.
        calls: As those of the :class:`FakeControl` that it belongs to.
    """

    refusal: str | None = "'-incoming' was not specified on the command line"
    migration: MigrationInfo | None = None
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def check_may_start(self) -> None:
        """Refuse as told."""
        if self.refusal is not None:
            raise QMPError(self.refusal)

    async def start(
        self, channels: Sequence[MigrationChannel], *, exit_on_error: bool, fds: FdLookup
    ) -> None:
        """Only remember it."""
        addresses = tuple(channel.address for channel in channels)
        self.calls.append(("migrate_incoming", addresses, exit_on_error))

    def check_recovery_may_start(self) -> None:
        """Nothing is paused."""
        raise QMPError("Migrate recover can only be run when postcopy is paused.")

    async def recover(self, address: Address, *, fds: FdLookup) -> None:
        """Only remember it."""
        self.calls.append(("migrate_recover", address))

    def info(self) -> MigrationInfo | None:
        """The destination's part."""
        return self.migration


@dataclass
class FakeOutgoing:
    """Implements ``migrationd.qmp.context.OutgoingControl``; keeps what it was asked.

    Attributes:
        migration: Of ``query-migrate``.
        calls: As those of the :class:`FakeControl` that it belongs to.
        options: As ``calls``.
    """

    migration: MigrationInfo | None = None
    calls: list[tuple[object, ...]] = field(default_factory=list)
    options: MigrationOptions = field(default_factory=MigrationOptions)

    def migrate(self, channels: Sequence[MigrationChannel], *, resume: bool, fds: FdLookup) -> None:
        """Only remember it."""
        if resume:
            raise QMPError("Cannot resume if there is no paused migration")
        self.calls.append(("migrate", tuple(channel.address for channel in channels)))

    def cancel(self) -> None:
        """Only remember it."""
        self.calls.append(("migrate_cancel",))

    def continue_from(self, state: str) -> None:
        """Nothing runs."""
        if state != "none":
            raise QMPError("Migration not in expected state: none")

    def start_postcopy(self) -> None:
        """Nothing runs."""
        if not self.options.capabilities["postcopy-ram"]:
            raise QMPError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        raise QMPError("Postcopy must be started after migration has been started")

    def check_capabilities_may_change(self) -> None:
        """They may."""

    def parameters_changed(self) -> None:
        """Only remember it."""
        self.calls.append(("parameters_changed",))

    def info(self) -> MigrationInfo | None:
        """The source's part."""
        return self.migration


@dataclass
class FakeControl:
    """Implements ``migrationd.qmp.context.Control``; keeps what it was asked.

    Attributes:
        calls: Name of each method that was called, with what matters of its arguments.
    """

    options: MigrationOptions = field(default_factory=MigrationOptions)
    guest_name: str | None = None
    guest_uuid: UUID | None = None
    run_state: str = "prelaunch"
    running: bool = False
    only_migratable: bool = False
    calls: list[tuple[object, ...]] = field(default_factory=list)
    incoming: FakeIncoming = field(default_factory=FakeIncoming)
    outgoing: FakeOutgoing = field(default_factory=FakeOutgoing)
    machine: FakeMachine = field(default_factory=FakeMachine)
    objects: ObjectRegistry = field(default_factory=ObjectRegistry)

    def __post_init__(self) -> None:
        self.incoming.calls = self.outgoing.calls = self.calls
        self.outgoing.options = self.options

    @property
    def colo_mode(self) -> str:
        """No replica."""
        return "none"

    @property
    def colo_exit(self) -> tuple[str, str]:
        """There never was one."""
        return "none", "none"

    def colo_lost_heartbeat(self) -> None:
        """No replica."""
        raise QMPError("VM is not in COLO mode")

    def migrate_pause(self) -> None:
        """Nothing runs."""
        raise QMPError(
            "migrate-pause is currently only supported during postcopy-active or "
            "postcopy-recover state"
        )

    async def stop(self) -> None:
        """Only remember it."""
        self.run_state = "paused"

    async def cont(self) -> None:
        """Only remember it."""
        self.calls.append(("cont",))

    def quit(self) -> None:
        """Only remember it."""
        self.calls.append(("quit",))

"""What handlers need of the daemon."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from migrationd.migration.dirty_limit import DirtyLimitState
from migrationd.migration.dirty_rate import DirtyRateRequest, DirtyRateState
from migrationd.migration.info import MigrationInfo
from migrationd.migration.options import MigrationOptions
from migrationd.transport.address import Address

FdLookup = Callable[[str], int]
"""Gives up the descriptor of a name; raises an error of ours if there is none."""


@dataclass(frozen=True, slots=True)
class MigrationChannel:
    """One entry of a ``channels`` argument."""

    channel_type: str
    address: Address


class Chardev(Protocol):
    """A monitor's character device."""

    @property
    def filename(self) -> str:
        """Where it is."""

    @property
    def is_socket(self) -> bool:
        """Whether its client can be cut off."""

    @property
    def is_pretty(self) -> bool:
        """Whether its output is spread over lines."""

    @property
    def is_connected(self) -> bool:
        """Whether it has a client."""

    def disconnect(self) -> None:
        """Cut the client off."""


class UserObject(Protocol):
    """An object that a user made."""

    @property
    def qom_type(self) -> str:
        """Its type."""

    @property
    def properties(self) -> Mapping[str, object]:
        """What it was made with, by QMP name."""


class Objects(Protocol):
    """User-made objects; what is refused raises an error of ours."""

    def __iter__(self) -> Iterator[str]:
        """Ids in the order in which they were made."""

    def add(self, qom_type: str, object_id: str, properties: Mapping[str, object]) -> None:
        """Make an object."""

    def delete(self, object_id: str) -> None:
        """Forget an object."""

    def find(self, object_id: str) -> UserObject | None:
        """The object of an id."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A block of a guest's main memory.

    Attributes:
        name: Of the block.
        size_bytes: Its size.
        is_shared: Whether another process has it mapped.
    """

    name: str
    size_bytes: int
    is_shared: bool


class DirtyRate(Protocol):
    """Measures the dirty rate."""

    state: DirtyRateState

    def start(self, request: DirtyRateRequest) -> None:
        """Begin a measurement."""


class JobState(Protocol):
    """A job as ``query-jobs`` shows it."""

    id: str
    type: str
    status: str
    error: str | None
    done: int


class Jobs(Protocol):
    """Jobs; what is refused raises a QMPError."""

    def list(self) -> Sequence[JobState]:
        """Every job that was not dismissed."""

    def start(self, job_id: str, job_type: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start a job."""

    def cancel(self, job_id: str) -> None:
        """``job-cancel``."""

    def pause(self, job_id: str) -> None:
        """``job-pause``."""

    def resume(self, job_id: str) -> None:
        """``job-resume``."""

    def complete(self, job_id: str) -> None:
        """``job-complete``."""

    def finalize(self, job_id: str) -> None:
        """``job-finalize``."""

    def dismiss(self, job_id: str) -> None:
        """``job-dismiss``."""


class SavedState(Protocol):
    """A snapshot."""

    @property
    def tag(self) -> str:
        """Its name."""

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""

    @property
    def saved_s(self) -> float:
        """When it was saved, in seconds since the epoch."""


class GuestSnapshots(Protocol):
    """Saved states of the guest; what cannot be done raises an error of ours."""

    @property
    def nodes(self) -> Sequence[str]:
        """Nodes that hold snapshots; none if nothing can be saved."""

    def check_nodes(self, devices: Sequence[str], vmstate: str | None = None) -> None:
        """Refuse nodes that are not there."""

    async def save(self, tag: str) -> None:
        """Save the guest."""

    async def load(self, tag: str) -> None:
        """Take up a saved state; the present one is given up."""

    async def delete(self, tag: str) -> None:
        """Remove a saved state; nothing if there is none."""

    async def list(self) -> Sequence[SavedState]:
        """All saved states, oldest first."""


class DirtyLimiter(Protocol):
    """Limits how fast the guest writes."""

    @property
    def state(self) -> DirtyLimitState | None:
        """Limit and rate; None without a limit."""

    def set(self, cpu_index: int | None, mib_per_s: int) -> None:
        """Limit it, or raise an error of ours."""

    def lift(self) -> None:
        """Let it write as it likes."""


class Machine(Protocol):
    """What is around the guest; called on the event loop."""

    @property
    def dirty_limit(self) -> DirtyLimiter:
        """Limits how fast the guest writes."""

    @property
    def dirty_rate(self) -> DirtyRate:
        """Measures how fast memory changes."""

    @property
    def jobs(self) -> Jobs:
        """Jobs of the process."""

    @property
    def snapshots(self) -> GuestSnapshots:
        """Saved states of the guest."""

    @property
    def type_name(self) -> str | None:
        """Versioned machine type of the guest."""

    @property
    def base_memory_bytes(self) -> int:
        """Size of the guest's main memory; 0 without a guest."""

    @property
    def ram_bytes(self) -> int:
        """Size of all RAM blocks of the guest; 0 without a guest."""

    @property
    def blockers(self) -> Sequence[str]:
        """Names of devices with which the guest cannot migrate."""

    @property
    def memory(self) -> Sequence[MemoryPart]:
        """The guest's main memory; empty without a guest."""

    async def reset(self) -> None:
        """Reset the machine."""

    async def powerdown(self) -> None:
        """Press the power button."""

    async def save_devices(self, path: str) -> None:
        """Write the state of the guest's devices to a file."""

    async def load_devices(self, path: str) -> None:
        """Take the state of the guest's devices from a file."""

    def chardevs(self) -> Mapping[str, Chardev]:
        """Character devices by label."""

    @property
    def is_migrating(self) -> bool:
        """Whether an outgoing migration is in progress."""

    @property
    def is_migration_yankable(self) -> bool:
        """Whether a migration has connections that can be cut off."""

    def yank_migration(self) -> None:
        """Cut the connections of the migration off."""


class IncomingControl(Protocol):
    """Commands on the incoming migration; called on the event loop."""

    def check_may_start(self) -> None:
        """Raise if no incoming migration can begin; asked before its address is parsed."""

    async def start(
        self, channels: Sequence[MigrationChannel], *, exit_on_error: bool, fds: FdLookup
    ) -> None:
        """Open the listener of an incoming migration."""

    def check_recovery_may_start(self) -> None:
        """Raise if no paused postcopy waits here; asked before the address is parsed."""

    async def recover(self, address: Address, *, fds: FdLookup) -> None:
        """Let the source of a paused postcopy in again."""

    def info(self) -> MigrationInfo | None:
        """The destination's part of ``query-migrate``."""


class OutgoingControl(Protocol):
    """Commands on the outgoing migration; called on the event loop."""

    def migrate(self, channels: Sequence[MigrationChannel], *, resume: bool, fds: FdLookup) -> None:
        """Start it, or go on with a paused postcopy."""

    def cancel(self) -> None:
        """Cancel it, if there is one."""

    def continue_from(self, state: str) -> None:
        """Go on from ``pre-switchover``."""

    def start_postcopy(self) -> None:
        """Let the guest run at its destination before its memory is there."""

    def check_capabilities_may_change(self) -> None:
        """Raise if a running migration forbids it."""

    def parameters_changed(self) -> None:
        """Make changed parameters take effect on a running migration."""

    def info(self) -> MigrationInfo | None:
        """The source's part of ``query-migrate``."""


class Control(Protocol):
    """Commands on the one guest of the process; called on the event loop."""

    options: MigrationOptions

    @property
    def objects(self) -> Objects:
        """Objects that users made."""

    @property
    def incoming(self) -> IncomingControl:
        """The incoming half."""

    @property
    def outgoing(self) -> OutgoingControl:
        """The outgoing half."""

    @property
    def machine(self) -> Machine:
        """What is around the guest."""

    @property
    def guest_name(self) -> str | None:
        """Name of the guest."""

    @property
    def guest_uuid(self) -> UUID | None:
        """UUID of the guest."""

    @property
    def only_migratable(self) -> bool:
        """``-only-migratable``."""

    @property
    def run_state(self) -> str:
        """QMP RunState."""

    @property
    def running(self) -> bool:
        """Whether the guest executes."""

    @property
    def colo_mode(self) -> str:
        """Whether a replica follows a guest, and on which side this is."""

    @property
    def colo_exit(self) -> tuple[str, str]:
        """Mode and reason of the last replica's end."""

    def colo_lost_heartbeat(self) -> None:
        """Go on without the other side."""

    def migrate_pause(self) -> None:
        """Break the connection of a postcopy."""

    async def stop(self) -> None:
        """Stop the guest."""

    async def cont(self) -> None:
        """Let the guest run."""

    def quit(self) -> None:
        """End the process."""

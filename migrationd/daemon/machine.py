"""What is around the guest: memory sizes, monitors, power and reset, yank.

Implements :class:`migrationd.qmp.context.Machine`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from migrationd.clock import Clock
from migrationd.daemon.dirty_rate import DirtyRateMeter
from migrationd.daemon.jobs import Jobs
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.snapshots import GuestSnapshots
from migrationd.errors import QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.qmp.context import Chardev
from migrationd.qmp.event_bus import EventBus

if TYPE_CHECKING:
    import asyncio


class Yankable(Protocol):
    """A migration as ``yank`` sees it."""

    @property
    def is_running(self) -> bool:
        """Whether it has, or may have, connections."""

    def yank(self) -> None:
        """Cut them off."""


class Machine:
    """The surroundings of the one guest; lives on the event loop.

    Args:
        bus: Where events go.
        clock: Time.
        chardevs: Character devices by label.
        shelter: Where the guest rests.
        guest: Gives the guest, or None if there is none.
        migrations: Gives the outgoing and the incoming migration.
        adopt: Takes another guest in place of the held one.
        spawn: Owns tasks.
    """

    def __init__(
        self,
        bus: EventBus,
        clock: Clock,
        chardevs: Mapping[str, Chardev],
        shelter: Shelter,
        *,
        guest: Callable[[], ParkedGuest | AttachedGuest | None],
        migrations: Callable[[], tuple[Yankable | None, Yankable | None]],
        adopt: Callable[[ParkedGuest], None],
        spawn: Callable[["asyncio.Future[None]"], None],
    ) -> None:
        self._bus = bus
        self._chardevs = chardevs
        self._guest = guest
        self._migrations = migrations
        self.dirty_rate = DirtyRateMeter(clock, guest, spawn)
        self.jobs = Jobs(bus, spawn)
        self.snapshots = GuestSnapshots(shelter, guest, lambda: self.is_migration_yankable, adopt)

    @property
    def type_name(self) -> str | None:
        """Versioned machine type of the guest."""
        guest = self._guest()
        return guest.identity.machine if guest is not None else None

    @property
    def base_memory_bytes(self) -> int:
        """Size of the guest's main memory, its largest block; 0 without a guest."""
        guest = self._guest()
        return max((block.used_length for block in guest.ram), default=0) if guest else 0

    @property
    def ram_bytes(self) -> int:
        """Size of all RAM blocks of the guest; 0 without a guest."""
        guest = self._guest()
        return sum(block.used_length for block in guest.ram) if guest else 0

    def reset(self) -> None:
        """Reset the machine.

        Raises:
            QMPError: There is a guest: its devices are bytes that nobody here can reset.
        """
        self._refuse_with_guest("system_reset")
        self._bus.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def powerdown(self) -> None:
        """Press the power button.

        Raises:
            QMPError: There is a guest, and its devices are not here to see that.
        """
        self._refuse_with_guest("system_powerdown")
        self._bus.emit("POWERDOWN", None)

    def chardevs(self) -> Mapping[str, Chardev]:
        """Character devices by label."""
        return self._chardevs

    @property
    def is_migrating(self) -> bool:
        """Whether an outgoing migration is in progress."""
        outgoing, _ = self._migrations()
        return outgoing is not None and outgoing.is_running

    @property
    def is_migration_yankable(self) -> bool:
        """Whether a migration has connections that can be cut off."""
        return any(item is not None and item.is_running for item in self._migrations())

    def yank_migration(self) -> None:
        """Cut the connections of the migration off."""
        for item in self._migrations():
            if item is not None and item.is_running:
                item.yank()

    def _refuse_with_guest(self, what: str) -> None:
        if self._guest() is not None:
            raise QMPError(f"{what}: migrationd does not run the machine of its guest")

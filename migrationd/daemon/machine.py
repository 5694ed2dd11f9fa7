"""What is around the guest: memory sizes, monitors, power and reset, yank.

Implements :class:`migrationd.qmp.context.Machine`.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from migrationd.clock import Clock
from migrationd.daemon.device_file import DeviceFiles
from migrationd.daemon.dirty_limit import DirtyLimiter
from migrationd.daemon.dirty_rate import DirtyRateMeter
from migrationd.daemon.jobs import Jobs
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.snapshots import GuestSnapshots
from migrationd.errors import QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import Owner
from migrationd.qmp.context import Chardev, MemoryPart
from migrationd.qmp.event_bus import EventBus


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
        self.dirty_limit = DirtyLimiter(clock, guest, spawn)
        self.jobs = Jobs(bus, spawn)
        self._device_files = DeviceFiles(bus, shelter, guest, lambda: self.is_migrating)
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

    @property
    def blockers(self) -> tuple[str, ...]:
        """Names of devices with which the guest cannot migrate."""
        guest = self._guest()
        return guest.blockers if isinstance(guest, AttachedGuest) else ()

    @property
    def memory(self) -> list[MemoryPart]:
        """The guest's main memory: its largest block, of a workload every one."""
        guest = self._guest()
        if guest is None or not guest.ram:
            return []
        is_shared = isinstance(guest, AttachedGuest)
        largest = max(guest.ram, key=lambda block: block.used_length)
        blocks = guest.ram if is_shared else (largest,)
        return [MemoryPart(block.idstr, block.used_length, is_shared) for block in blocks]

    async def reset(self) -> None:
        """Reset the machine; a workload is told to begin anew.

        Raises:
            QMPError: The guest is parked: nobody here can reset devices that are bytes.
            GuestError: A workload cannot be reset.
        """
        guest = self._acting("system_reset")
        if guest is not None:
            await asyncio.to_thread(guest.reset)
        self._bus.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    async def powerdown(self) -> None:
        """Press the power button: a workload is told, and does about it what it likes.

        Raises:
            QMPError: The guest is parked, and its devices are not here to see that.
            GuestError: A workload does not answer.
        """
        guest = self._acting("system_powerdown")
        if guest is not None:
            await asyncio.to_thread(guest.powerdown)
        self._bus.emit("POWERDOWN", None)

    async def save_devices(self, path: str) -> None:
        """Write the state of the guest's devices to a file."""
        await self._device_files.save(path)

    async def load_devices(self, path: str) -> None:
        """Take the state of the guest's devices from a file."""
        await self._device_files.load(path)

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

    def _acting(self, what: str) -> AttachedGuest | None:
        """The workload that can act on something; None without a guest."""
        guest = self._guest()
        if guest is None:
            return None
        if not isinstance(guest, AttachedGuest):
            raise QMPError(f"{what}: migrationd does not run the machine of its guest")
        if self.is_migrating or guest.owner is not Owner.HELD:
            raise QMPError(f"{what}: the guest is being migrated, or is elsewhere")
        return guest

"""A machine's guest that is made to look alive: its RAM is written between passes, by a script.

It came from a real QEMU, with its devices, and goes to a real QEMU: what a live guest's
passes put on the wire is judged there. Its processor stands still, so that what must arrive
is known to the byte.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migrationd.clock import SystemClock
from migrationd.daemon.shelter import MemoryBerth
from migrationd.errors import GuestError
from migrationd.guest.base import SeenOnArrival
from migrationd.guest.instant import MemoryAtInstant
from migrationd.guest.memory import Pages
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock
from migrationd.guest.run_state import LazyHandOver
from migrationd.incoming.berth import IncomingSettings
from migrationd.incoming.driver import IncomingMigration
from migrationd.migration.dialect import dialect_of
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.driver import OutgoingMigration
from migrationd.outgoing.postcopy_learned import Order
from migrationd.transport.address import UnixAddress
from migrationd.transport.channel import Channel
from migrationd.transport.connect import connect
from migrationd.transport.listen import listen
from tests.support.moves import Host

Rows = npt.NDArray[np.uint8]
Script = Callable[[int, Rows], Pages]
"""Given the number of the pass and a block's pages, writes some and returns which."""


class ScriptedGuest:
    """A parked guest whose main RAM block is written by a script; it is its own ``Live``.

    Args:
        parked: The guest; owned.
        main: Name of the block that is written.
        passes: How often.
        script: What.
    """

    seen: SeenOnArrival

    def __init__(self, parked: ParkedGuest, main: str, passes: int, script: Script) -> None:
        self._parked = parked
        self.main_block = next(block for block in parked.ram if block.idstr == main)
        self._tracker = _Tracker(self, passes, script)
        self.is_running = True
        self.ram: Sequence[RamBlock] = parked.ram
        self.devices = parked.devices
        self.vmdescription = parked.vmdescription
        self.identity = parked.identity
        self.seen = parked.seen
        self.page_size = parked.page_size
        self.file = None
        for block in parked.ram:
            block.memory.view.reshape(-1, block.page_size)[~block.present] = 0

    @property
    def live(self) -> "ScriptedGuest":
        """Itself."""
        return self

    @property
    def tracker(self) -> "_Tracker":
        """The script."""
        return self._tracker

    def watch_writes(self) -> "_Tracker":
        """The script: it has one reader."""
        return self._tracker

    @property
    def main(self) -> Rows:
        """What the written block holds."""
        return self.main_block.memory.view

    def check_unchanged(self) -> None:
        """It changes by script alone."""

    def touched_runs(self, block: RamBlock) -> Pages:
        """All of it."""
        return np.array([[0, block.page_count]], np.int64)

    def know_present(self) -> None:
        """All of it."""
        for block in self.ram:
            block.present[:] = True

    def stop(self) -> bool:
        """It writes nothing any more."""
        was_running, self.is_running = self.is_running, False
        self._tracker.passes_left = min(self._tracker.passes_left, 1)
        return was_running

    def start(self) -> bool:
        """It may write again."""
        was_running, self.is_running = self.is_running, True
        return not was_running

    def throttle(self, percentage: int) -> None:
        """It does as the script says."""

    def run_state_held(self) -> contextlib.AbstractContextManager[object]:
        """Nobody else stops it."""
        return contextlib.nullcontext()

    def memory_at_instant(self) -> MemoryAtInstant:
        """It has no write protection.

        Raises:
            GuestError: Always.
        """
        raise GuestError("a scripted guest's writes cannot be made to wait")

    def save_devices(self, *, was_running: bool) -> None:
        """They are as they came."""

    def close(self) -> None:
        """Release the memory."""
        self._parked.close()


class _Tracker:
    """Lets the script write when it is asked what was written."""

    def __init__(self, guest: ScriptedGuest, passes: int, script: Script) -> None:
        self._guest = guest
        self._script = script
        self._passes = 0
        self.passes_left = passes

    def stop(self) -> None:
        """Nobody asks any more."""

    def start(self) -> None:
        """Nothing was written yet."""

    def collect(self) -> list[Pages]:
        """Write, and say where."""
        is_writing = self.passes_left > 0
        self.passes_left -= is_writing
        self._passes += is_writing
        found = []
        for block in self._guest.ram:
            pages = np.empty(0, np.int64)
            if is_writing and block is self._guest.main_block:
                pages = self._script(self._passes, self._guest.main.reshape(-1, block.page_size))
            found.append(np.sort(pages))
        return found

    def peek(self) -> int:
        """It writes only when it is asked."""
        return 0


class SilentObserver:
    """Keeps the statuses and does nothing."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.passes = 0

    def on_status(self, status: str) -> None:
        """See the observer's protocol."""
        self.statuses.append(status)

    def on_pass(self, number: int) -> None:
        """See the observer's protocol."""
        self.passes = number

    async def hold_still(self) -> None:
        """Nobody else starts it."""

    def let_go(self) -> None:
        """Nobody was kept."""

    def on_stopped(self) -> None:
        """See the observer's protocol."""

    def on_colo_exit(self, reason: str) -> None:
        """Nobody asks."""

    def on_resumed(self) -> None:
        """See the observer's protocol."""

    async def before_switchover(self, lazy: LazyHandOver | None) -> None:
        """See the observer's protocol."""

    def running_there(self) -> None:
        """See the observer's protocol."""

    def on_learned(self, order: Order) -> None:
        """See the observer's protocol."""

    async def handed_over(self) -> None:
        """See the observer's protocol."""

    async def kept(self, *, may_be_elsewhere: bool) -> None:
        """See the observer's protocol."""


async def take_from_qemu(host: Host, directory: Path) -> tuple[ParkedGuest, str]:
    """Let a guest run for a while in a QEMU and take it, with what it printed there."""
    path = str(directory / "take.sock")
    incoming = IncomingMigration(MemoryBerth(), IncomingSettings, lambda _: None)
    incoming.begin()
    incoming.listen_on(await listen(UnixAddress(path), lambda _: -1))
    loading = asyncio.create_task(incoming.run())
    async with await host.start("QEMU A") as qemu:
        await qemu.wait_serial(2)
        await qemu.execute("stop")
        await qemu.migrate(f"unix:{path}")
        await qemu.wait_migration("completed")
        guest = await loading
        printed = qemu.serial
    assert isinstance(guest, ParkedGuest), incoming.error
    return guest, printed


async def send_live(
    guest: ScriptedGuest, path: str, settings: OutgoingSettings
) -> tuple[OutgoingMigration, SilentObserver]:
    """Send it to whoever listens there; ends in whatever status."""

    async def open_channel() -> Channel:
        return await connect(UnixAddress(path))

    observer = SilentObserver()
    dialect = dialect_of(guest.identity.machine, guest.seen)
    migration = OutgoingMigration(guest, dialect, settings, SystemClock(), observer)
    migration.begin()
    async with asyncio.timeout(60):
        await migration.run(open_channel)
    return migration, observer

"""What a guest is to the engines: memory, device sections, and how its stream looks.

An engine never asks which kind of guest it has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from migrationd.guest.device import DeviceState
from migrationd.guest.dirty import DirtyTracker
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.instant import MemoryAtInstant
from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock


@dataclass(frozen=True, slots=True)
class SeenOnArrival:
    """What the stream that brought a guest contained; it leaves in the same form."""

    configuration: bool = True
    section_footers: bool = True
    vmdescription: bool = True
    switchover_start: bool = True


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """What the configuration says about a guest.

    Attributes:
        machine: Versioned machine type; None if the stream had no configuration.
        target_page_bits: Of targets with a variable page size, else None.
        capabilities: Validated capabilities of the stream; None if not sent.
        uuid: 16 bytes if the source sent it.
    """

    machine: str | None = None
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None


class Live(Protocol):
    """What can be done with a guest that executes; every call may block for seconds."""

    @property
    def is_running(self) -> bool:
        """Whether it executes now."""

    @property
    def tracker(self) -> DirtyTracker:
        """Which pages it writes."""

    def watch_writes(self) -> DirtyTracker:
        """Which pages it writes, for somebody else than :attr:`tracker`.

        Raises:
            GuestError: Its memory cannot be tracked.
        """

    def touched_runs(self, block: RamBlock) -> Pages:
        """Runs of pages that may hold something, shape ``(n, 2)``: first page, count."""

    def know_present(self) -> None:
        """Make ``present`` of every block say, in place, which pages may hold something."""

    def stop(self) -> bool:
        """Stop it if it runs; when this returns it changes nothing any more.

        Who holds its run state may have stopped it for a moment, which is waited for.

        Returns:
            Whether it ran.

        Raises:
            GuestError: It does not stop; it goes on.
        """

    def start(self) -> bool:
        """Let it execute if it stands still.

        Who holds its run state may have stopped it for a moment, which is waited for.

        Returns:
            Whether it stood still.

        Raises:
            GuestError: It does not start; where it may have, it counts as running.
        """

    def throttle(self, percentage: int) -> None:
        """Let it give up this share of its time.

        Raises:
            GuestError: It does not.
        """

    def run_state_held(self) -> AbstractContextManager[object]:
        """While it is entered, only this thread stops and starts the guest; others wait."""

    def memory_at_instant(self) -> MemoryAtInstant:
        """What its memory will have been at an instant to come.

        Raises:
            GuestError: Its writes cannot be made to wait.
        """

    def save_devices(self, *, was_running: bool) -> None:
        """Take the state of the stopped guest's devices.

        Raises:
            GuestError: A device cannot be saved.
        """


@contextmanager
def held_still(
    live: Live, on_stopped: Callable[[], object], on_resumed: Callable[[], object]
) -> Iterator[bool]:
    """The guest stands still inside the block and goes on behind it, if it ran.

    Args:
        live: The guest; nobody else stops or starts it meanwhile.
        on_stopped: Called on this thread when it was stopped.
        on_resumed: The same when it goes on.

    Yields:
        Whether it ran.

    Raises:
        GuestError: It does not stop, or does not go on.
    """
    with live.run_state_held():
        was_running = live.stop()
        if was_running:
            on_stopped()
        try:
            yield was_running
        finally:
            if was_running:
                try:
                    live.start()
                finally:
                    if live.is_running:
                        on_resumed()


class Guest(Protocol):
    """A guest that can be sent; it is only read while it is."""

    @property
    def identity(self) -> GuestIdentity:
        """What the configuration says."""

    @property
    def ram(self) -> Sequence[RamBlock]:
        """RAM blocks in the order of the block list."""

    @property
    def devices(self) -> Sequence[DeviceState]:
        """Device sections in the order in which they travel."""

    @property
    def vmdescription(self) -> bytes | None:
        """JSON that describes the device sections, if there is one."""

    @property
    def file(self) -> GuestFile | None:
        """The file that all pages are in, if they are in one."""

    def check_unchanged(self) -> None:
        """Make sure that what is read of the guest is still what arrived.

        Raises:
            GuestError: It is not.
        """

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""

    @property
    def live(self) -> Live | None:
        """How to handle it while it executes; None for a guest that never does."""

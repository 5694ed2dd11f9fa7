"""What a guest is to the engines: memory, device sections, and how its stream looks.

An engine never asks which kind of guest it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
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

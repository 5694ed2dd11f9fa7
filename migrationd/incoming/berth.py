"""What an incoming migration is told and given: its settings, and room for the guest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.held import HeldGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.store.mapped_ram_reader import Contents


class Berth(Protocol):
    """Where an arriving guest gets its memory, and is made durable."""

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> HeldGuest:
        """Make a guest of these blocks; called on the loading thread.

        Args:
            identity: From the configuration.
            early: Device sections that came before RAM.
            blocks: The block list.

        Raises:
            GuestError: There is not enough memory.
            StoreError: The file cannot be made.
        """

    def adopt(self, fd: int, contents: Contents) -> HeldGuest:
        """Take the guest of a mapped-ram file; called on the loading thread.

        Args:
            fd: File, open for reading; stays the caller's.
            contents: What it holds.

        Raises:
            GuestError: It cannot be mapped.
            StoreError: The file does not hold what it says, or no other can be made.
        """

    def settle(self, guest: HeldGuest) -> None:
        """Make the complete guest durable; called on the loading thread.

        Raises:
            StoreError: The guest is not on stable storage.
        """

    def abandon(self) -> None:
        """Throw away what :meth:`allocate` made; called after a failure."""


@dataclass(frozen=True, slots=True)
class IncomingSettings:
    """What the monitor and the command line chose for this migration."""

    ram_limit_bytes: int | None = None
    switchover_ack: bool = False
    colo: bool = False
    validate_uuid: bool = False
    guest_uuid: bytes | None = None
    mapped_ram: bool = False
    ignores_shared: bool = False
    postcopy_ram: bool = False
    postcopy_preempt: bool = False
    postcopy_blocktime: bool = False
    multifd_channels: int = 0
    multifd_compression: str = "none"
    bitmap_mapping: BitmapMapping | None = None

"""A guest as it leaves: its block dirty bitmaps under the names of the stream."""

from collections.abc import Sequence

from migrationd.codec.command import encode_command
from migrationd.codec.constants import MIG_CMD_POSTCOPY_ADVISE
from migrationd.codec.records import Command
from migrationd.guest.base import Guest, GuestIdentity, Live
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.migration.dirty_bitmaps import for_departure, has_bitmaps


def departing(guest: Guest, mapping: BitmapMapping | None) -> Guest:
    """The guest that a stream shows; the same one where it has no bitmaps.

    Args:
        guest: The guest.
        mapping: Which bitmaps go, and their names; None: all go under their own.

    Raises:
        StreamCorrupt: The bitmaps that are kept are malformed.
    """
    if guest.live is not None or not has_bitmaps(guest.devices):
        return guest
    return _Renamed(guest, for_departure(guest.devices, mapping))


def advise_bitmaps() -> bytes:
    """ADVISE of a source that may send dirty bitmaps, but no pages, by postcopy."""
    return encode_command(Command(MIG_CMD_POSTCOPY_ADVISE, b""))


class _Renamed:
    """A guest at rest with other device sections."""

    def __init__(self, guest: Guest, devices: tuple[DeviceState, ...]) -> None:
        self._guest = guest
        self._devices = devices

    @property
    def identity(self) -> GuestIdentity:
        return self._guest.identity

    @property
    def ram(self) -> Sequence[RamBlock]:
        return self._guest.ram

    @property
    def devices(self) -> Sequence[DeviceState]:
        return self._devices

    @property
    def vmdescription(self) -> bytes | None:
        return self._guest.vmdescription

    @property
    def file(self) -> GuestFile | None:
        return self._guest.file

    def check_unchanged(self) -> None:
        self._guest.check_unchanged()

    @property
    def page_size(self) -> int:
        return self._guest.page_size

    @property
    def live(self) -> Live | None:
        return None

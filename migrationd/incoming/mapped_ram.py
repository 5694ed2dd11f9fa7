"""A guest out of a mapped-ram file: its pages stay in the file and are mapped.

Opening costs the same whatever the guest's size, bitmaps apart: a bit for each page.

Reference: stream format 8.3.
"""

from collections.abc import Mapping
from dataclasses import fields

from migrationd.errors import GuestError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.memory import FileMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.store.mapped_ram_reader import Contents, read_bitmap


def identity_of(contents: Contents) -> GuestIdentity:
    """What a file says about its guest; that it is a mapped-ram file is not part of it."""
    configuration = contents.configuration
    return GuestIdentity(
        configuration.machine, configuration.target_page_bits, None, configuration.uuid
    )


def specs_of(contents: Contents) -> list[RamBlockSpec]:
    """The RAM blocks of a file, in order."""
    return [
        RamBlockSpec(block.idstr, block.used_length, block.page_size) for block in contents.blocks
    ]


def complete_guest(
    guest: ParkedGuest, contents: Contents, seen: Mapping[str, bool] | None = None
) -> None:
    """Add device sections and description to a guest whose RAM is there.

    Args:
        guest: The guest.
        contents: What the file holds.
        seen: What is known of the stream that it came in; the rest is taken from the file.
    """
    known = {field.name for field in fields(SeenOnArrival)}
    values = {"switchover_start": contents.has_switchover_start, **(seen or {})}
    guest.complete(
        [DeviceState.of_section(section, in_setup=True) for section in contents.early]
        + [DeviceState.of_section(section, in_setup=False) for section in contents.late],
        contents.vmdescription,
        SeenOnArrival(**{name: value for name, value in values.items() if name in known}),
    )


def map_guest(fd: int, contents: Contents, seen: Mapping[str, bool] | None = None) -> ParkedGuest:
    """Map the guest of a file, read-only; the descriptor may be closed afterwards.

    Args:
        fd: File.
        contents: What it holds.
        seen: As for :func:`complete_guest`.

    Raises:
        StoreError: The file does not hold what it says.
        GuestError: It cannot be mapped.
    """
    guest = ParkedGuest.create(
        identity_of(contents),
        specs_of(contents),
        lambda index, spec: FileMemory(
            fd, contents.blocks[index].pages_position, spec.used_length, spec.page_size
        ),
    )
    try:
        guest.rest_in(GuestFile(fd))
        for block, place in zip(guest.ram, contents.blocks, strict=True):
            block.present[:] = read_bitmap(fd, place)
        complete_guest(guest, contents, seen)
    except OSError as error:
        guest.close()
        raise GuestError(f"the guest's file: {error.strerror}") from error
    except BaseException:
        guest.close()
        raise
    return guest

"""A guest out of a mapped-ram file: its pages stay in the file and are mapped.

Opening costs the same whatever the guest's size, bitmaps apart: a bit for each page.

Reference: stream format 8.3.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from migrationd.codec.records import Configuration
from migrationd.errors import GuestError, StoreError, StreamUnsupported
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.held import HeldGuest
from migrationd.guest.memory import FileMemory, page_runs
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.kept_sections import renamed
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.migration.dirty_bitmaps import without_incomplete
from migrationd.store.container import read_container
from migrationd.store.mapped_ram import CAPABILITY, PlacedBlock
from migrationd.store.mapped_ram_reader import Contents, read_contents, read_packed_bitmap
from migrationd.store.page_writer import PageSource, PageWriter
from migrationd.transport.channel import Channel

LOAD_PAGES = 4096
"""Pages of one copy: 16 MiB."""


def load_mapped_ram(
    channel: Channel,
    adopt: Callable[[int, Contents], HeldGuest],
    *,
    ram_limit_bytes: int | None,
    check: Callable[[Configuration], None],
    mapping: BitmapMapping | None = None,
) -> HeldGuest:
    """Open the guest of a file that an incoming migration reads.

    Args:
        channel: The file, at the position where its stream begins.
        adopt: Makes a guest of the file and its contents.
        ram_limit_bytes: Largest guest that is taken.
        check: Refuses a configuration.
        mapping: ``block-bitmap-mapping``: under which names dirty bitmaps are kept.

    Raises:
        StreamUnsupported: It is no file, or a plain stream.
        StoreError: The file is damaged.
        GuestError: It cannot be mapped.
    """
    if not channel.is_seekable:
        raise StreamUnsupported("Migration requires seekable transport (e.g. file)")
    with channel.descriptor() as fd:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        container = read_container(fd, "the file", position=position)
        if not container.is_mapped_ram:
            raise StreamUnsupported(
                f"Capability {CAPABILITY} is on, but received capability is off",
                position=position,
                section="configuration",
                hint=f"the file holds a {container.form}",
            )
        # The head of libvirt's save image belongs to libvirt: its stream is what counts.
        contents = read_contents(
            fd, "the file", position=container.position, ram_limit_bytes=ram_limit_bytes
        )
        check(contents.configuration)
        return adopt(fd, _with_names(contents, mapping))


def _with_names(contents: Contents, mapping: BitmapMapping | None) -> Contents:
    sections = renamed((*contents.early, *contents.late), mapping)
    count = len(contents.early)
    return replace(contents, early=tuple(sections[:count]), late=tuple(sections[count:]))


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
    guest: HeldGuest, contents: Contents, seen: Mapping[str, bool] | None = None
) -> None:
    """Add device sections and description to a guest whose RAM is there.

    Args:
        guest: The guest.
        contents: What the file holds.
        seen: What is known of the stream that it came in; the rest is taken from the file.
    """
    known = {field.name for field in fields(SeenOnArrival)}
    values = {"switchover_start": contents.has_switchover_start, **(seen or {})}
    sections = [DeviceState.of_section(section, in_setup=True) for section in contents.early]
    sections += [DeviceState.of_section(section, in_setup=False) for section in contents.late]
    guest.complete(
        without_incomplete(sections),
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
            block.use_bitmap(read_packed_bitmap(fd, place))
        complete_guest(guest, contents, seen)
    except OSError as error:
        guest.close()
        raise GuestError(f"the guest's file: {error.strerror}") from error
    except BaseException:
        guest.close()
        raise
    return guest


def load_pages(source: ParkedGuest, ram: Sequence[RamBlock]) -> None:
    """Copy the pages of a mapped guest into other memory, which is zero.

    Args:
        source: A guest whose pages are in a file.
        ram: Blocks of the same lengths, in the same order.

    Raises:
        GuestError: The memory cannot be written, or the file was changed meanwhile.
    """
    for origin, block in zip(source.ram, ram, strict=True):
        content = origin.memory.view.reshape(origin.page_count, origin.page_size)
        for first, count in page_runs(np.flatnonzero(origin.present)).tolist():
            for start in range(first, first + count, LOAD_PAGES):
                end = min(start + LOAD_PAGES, first + count)
                block.place_batch(np.arange(start, end), content[start:end], True)
    source.check_unchanged()


def copy_pages(guest: ParkedGuest, fd: int, places: Sequence[PlacedBlock]) -> None:
    """Put the pages of a mapped guest into another file.

    Args:
        guest: A guest whose pages are in a file.
        fd: The other file, open for writing.
        places: Where its blocks go, in the same order.

    Raises:
        StoreError: The file takes nothing more.
    """
    sources = []
    for block in guest.ram:
        memory = block.memory
        assert isinstance(memory, FileMemory)
        assert guest.file is not None
        sources.append(
            PageSource(memory.view, block.present, block.page_size, guest.file.fd, memory.position)
        )
    try:
        writer = PageWriter(fd, sources, places)
        try:
            writer.write()
        finally:
            writer.close()
    except OSError as error:
        raise StoreError(f"the guest cannot be stored: {error.strerror}") from error

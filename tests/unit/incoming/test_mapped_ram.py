import os
from pathlib import Path

import numpy as np
import pytest

from migrationd.codec.records import Configuration
from migrationd.errors import GuestError, StoreError, StreamUnsupported
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.mapped_ram import load_mapped_ram, load_pages, map_guest
from migrationd.store.libvirt_image import LibvirtImage, encode_libvirt_image
from migrationd.store.mapped_ram_reader import read_contents
from migrationd.transport.channel import Channel
from tests.support.descriptors import open_count
from tests.unit.store.guests import BLOCKS, EARLY, LATE, PAGE, page, present_pages, store_guest


def load(
    path: Path, *, offset: int = 0, limit: int | None = None
) -> tuple[ParkedGuest, list[Configuration]]:
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, offset, os.SEEK_SET)
    channel = Channel(fd)
    seen: list[Configuration] = []
    try:
        guest = load_mapped_ram(channel, map_guest, ram_limit_bytes=limit, check=seen.append)
    finally:
        channel.close()
    assert isinstance(guest, ParkedGuest)
    return guest, seen


def test_the_guest_is_the_files(tmp_path: Path) -> None:
    guest, seen = load(store_guest(tmp_path))
    assert [configuration.machine for configuration in seen] == ["pc-i440fx-10.0"]
    assert guest.identity.capabilities is None, "the next stream is a plain one"
    assert [(block.idstr, block.used_length) for block in guest.ram] == list(BLOCKS)
    assert [d.to_section() for d in guest.devices] == [*EARLY, *LATE]
    assert [d.is_early for d in guest.devices] == [True, False, False, False]
    for block, present in zip(guest.ram, present_pages(), strict=True):
        assert block.present_count == np.count_nonzero(present)
        assert np.array_equal(block.present, present)
        assert block.present_count == np.count_nonzero(present)
        assert bytes(block.page(0)) == page(0)
        assert bytes(block.page(1)) == bytes(PAGE)
    guest.close()


def test_what_is_no_mapped_ram_file_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"QEVM\0\0\0\x03\x07\0\0\0\x02pc" + bytes(64))
    with pytest.raises(StreamUnsupported, match=r"Capability mapped-ram is on, but received"):
        load(plain)
    source, target = os.pipe()
    os.close(target)
    with pytest.raises(StreamUnsupported, match="requires seekable transport"):
        load_mapped_ram(Channel(source), map_guest, ram_limit_bytes=None, check=lambda _: None)
    with pytest.raises(StoreError, match="raise -ram-limit"):
        load(store_guest(tmp_path), limit=1 << 20)


def test_a_refused_configuration_maps_nothing(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    before = open_count()

    def refuse(_: Configuration) -> None:
        raise GuestError("another guest")

    with pytest.raises(GuestError, match="another guest"):
        load_mapped_ram(
            Channel(os.open(path, os.O_RDONLY)),
            lambda _fd, _contents: pytest.fail("it was mapped"),
            ram_limit_bytes=None,
            check=refuse,
        )
    assert open_count() <= before + 2  # the channel that stays open here


def test_the_sparse_save_image_of_libvirt(tmp_path: Path) -> None:
    """Its places count from the start of the image, as for any offset."""
    from migrationd.ctl.file_guest import FileGuest
    from migrationd.migration.dialect import dialect_of
    from migrationd.outgoing.mapped_ram_save import MappedRamSaver

    path = tmp_path / "image"
    head = encode_libvirt_image(
        LibvirtImage(b"<domain/>", was_running=True, compression="sparse"), align=4096
    )
    with FileGuest(store_guest(tmp_path)) as source, path.open("w+b") as file:
        file.write(head)
        file.flush()
        guest = source.guest
        saver = MappedRamSaver(
            file.fileno(), guest, dialect_of(guest.identity.machine), position=len(head)
        )
        saver.begin()
        saver.save_pages()
        saver.finish()
    for offset in (0, len(head)):
        loaded, _ = load(path, offset=offset)
        assert bytes(loaded.ram[0].page(3)) == page(3)
        loaded.close()


def test_pages_are_loaded_without_what_lies_at_the_places_of_zero_pages(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    with path.open("r+b") as file:
        contents = read_contents(file.fileno(), "file")
        os.pwrite(file.fileno(), page(9), contents.blocks[0].pages_position + PAGE)
    with path.open("rb") as file:
        guest = map_guest(file.fileno(), contents)
    ram = [
        RamBlock(RamBlockSpec(idstr, length, PAGE), AnonymousMemory(length, PAGE))
        for idstr, length in BLOCKS
    ]
    load_pages(guest, ram)
    for block, origin in zip(ram, guest.ram, strict=True):
        assert np.array_equal(block.present, origin.present)
        pages = block.memory.view.reshape(-1, PAGE)
        assert not pages[~block.present].any()
        assert np.array_equal(
            pages[block.present], origin.memory.view.reshape(-1, PAGE)[block.present]
        )
    guest.close()

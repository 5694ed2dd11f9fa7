"""Dirty bitmaps of a guest: what it has, new names, and what stays behind."""

import pytest

from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.dirty_bitmap import BitmapWriter, Bits, Chunk, Complete, Start
from migrationd.errors import StreamCorrupt
from migrationd.guest.device import DeviceState
from migrationd.migration.bitmap_mapping import BitmapAlias, NodeAlias
from migrationd.migration.dirty_bitmaps import (
    DirtyBitmap,
    bitmaps_of,
    for_departure,
    on_arrival,
    without_incomplete,
)

SERIAL = DeviceState("serial", 0, 1, b"x", QEMU_VM_SECTION_FULL, 9)
A, B = ("disk", "a"), ("disk", "b")


def sections(*, completed: tuple[tuple[str, str], ...] = (A, B)) -> list[DeviceState]:
    """Bitmap ``a`` with three bits and ``b`` with none."""
    writer = BitmapWriter()
    begin = writer.write([Chunk(*A, Start(4096, 1)), Chunk(*B, Start(65536, 2))])
    end = writer.write(
        [
            Chunk(*A, Bits(0, 64, b"\x83" + bytes(31))),
            Chunk(*B, Bits(0, 128, None)),
            *(Chunk(*key, Complete()) for key in completed),
        ]
    )
    return [
        DeviceState("dirty-bitmap", 0, 1, begin, QEMU_VM_SECTION_START, 3),
        DeviceState("dirty-bitmap", 0, 1, end, QEMU_VM_SECTION_END, 3),
        SERIAL,
    ]


def test_what_a_guest_has() -> None:
    assert bitmaps_of(sections()) == (
        DirtyBitmap("disk", "a", 4096, True, False, 3 * 4096, True),
        DirtyBitmap("disk", "b", 65536, False, True, 0, True),
    )
    assert bitmaps_of([SERIAL]) == ()


def test_without_a_mapping_everything_leaves_as_it_came() -> None:
    assert for_departure(sections(), None) == tuple(sections())


def test_a_mapping_renames_and_leaves_behind() -> None:
    mapping = (NodeAlias("disk", "wire", (BitmapAlias("a", "1", True, True),)),)
    sent = for_departure(sections(), mapping)
    assert bitmaps_of(sent) == (DirtyBitmap("wire", "1", 4096, True, True, 3 * 4096, True),)
    assert sent[-1] is SERIAL
    arriving = on_arrival((NodeAlias("here", "wire", (BitmapAlias("back", "1"),)),))
    bodies = [arriving.translate(device.body) for device in sent[:2]]
    back = [DeviceState("dirty-bitmap", 0, 1, body, 1, 3) for body in bodies]
    assert bitmaps_of(back) == (DirtyBitmap("here", "back", 4096, True, True, 3 * 4096, True),)


def test_transient_by_mapping() -> None:
    mapping = (NodeAlias("disk", "disk", (BitmapAlias("b", "b", False, True),)),)
    assert not bitmaps_of(for_departure(sections(), mapping))[0].persistent


def test_where_no_bitmap_leaves_no_section_does() -> None:
    assert for_departure(sections(), ()) == (SERIAL,)


def test_a_bitmap_without_its_end_is_none() -> None:
    kept = without_incomplete(sections(completed=(B,)))
    assert [bitmap.name for bitmap in bitmaps_of(kept)] == ["b"]
    assert len(kept) == 3
    assert for_departure(without_incomplete(sections(completed=())), None) == (SERIAL,)


def test_malformed_sections_are_refused() -> None:
    broken = DeviceState("dirty-bitmap", 0, 1, b"\x20\1", QEMU_VM_SECTION_START, 3)
    with pytest.raises(StreamCorrupt, match="names no bitmap"):
        bitmaps_of([broken])

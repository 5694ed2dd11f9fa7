import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrationd.errors import StoreError
from migrationd.store.mapped_ram import (
    CAPABILITY,
    PlacedBlock,
    encode_tail,
    plan_layout,
    write_bitmap,
)
from migrationd.store.mapped_ram_reader import Contents, read_bitmap, read_contents
from tests.unit.store.guests import (
    BLOCKS,
    CONFIGURATION,
    EARLY,
    END,
    LATE,
    PAGE,
    PART,
    START,
    page,
    present_pages,
    section,
    store_guest,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return store_guest(tmp_path_factory.mktemp("stored")).read_bytes()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Contents]:
    """Reads bytes as a file."""

    def read_bytes(data: bytes) -> Contents:
        path = tmp_path / "file"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_contents(fd, "file")
        finally:
            os.close(fd)

    return read_bytes


def test_pages_areas_begin_at_mebibytes_behind_their_bitmaps() -> None:
    layout = plan_layout(CONFIGURATION, EARLY, BLOCKS, PAGE)
    assert [block.pages_position for block in layout.blocks] == [MIB, 4 * MIB, 5 * MIB]
    end = 0
    for (position, data), block in zip(layout.pieces, layout.blocks, strict=False):
        assert position == end
        assert block.bitmap_position == position + len(data)
        assert block.bitmap_position + block.bitmap_bytes <= block.pages_position
        end = block.end_position
    assert layout.pieces[-1][0] == end
    assert layout.tail_position == end + len(layout.pieces[-1][1])


def test_a_bitmap_of_more_than_a_mebibyte_moves_its_pages_area() -> None:
    layout = plan_layout(CONFIGURATION, (), (("pc.ram", 64 << 30),), PAGE)
    block = layout.blocks[0]
    assert block.bitmap_bytes == 2 * MIB
    assert block.pages_position == 3 * MIB


def test_a_guest_reads_back(stored: bytes, read: Callable[[bytes], Contents]) -> None:
    contents = read(stored)
    assert contents.configuration.machine == CONFIGURATION.machine
    assert contents.configuration.uuid == CONFIGURATION.uuid
    assert contents.configuration.capabilities == (CAPABILITY,)
    assert [(block.idstr, block.used_length) for block in contents.blocks] == list(BLOCKS)
    assert contents.early == EARLY
    assert contents.late == LATE
    assert contents.vmdescription == b"{}"
    assert contents.has_switchover_start


def test_pages_are_where_the_blocks_say_and_zero_pages_are_not_present(
    stored: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(stored)
    fd = os.open(path, os.O_RDONLY)
    contents = read_contents(fd, "file")
    for block, present in zip(contents.blocks, present_pages(), strict=True):
        assert (read_bitmap(fd, block) == present).all()
        for number in np.flatnonzero(present).tolist():
            at = block.pages_position + number * PAGE
            assert stored[at : at + PAGE] == page(number)
    os.close(fd)


def test_a_stream_may_begin_anywhere_in_a_file(tmp_path: Path) -> None:
    layout = plan_layout(CONFIGURATION, (), (("pc.ram", 4 * PAGE),), PAGE)
    start = 512
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    # As QEMU writes with an offset: places count from the beginning of the file.
    head = bytearray(layout.pieces[0][1])
    block = layout.blocks[0]
    shifted = PlacedBlock(
        block.idstr, block.used_length, PAGE, block.bitmap_position + start, block.pages_position
    )
    head[-16:-8] = shifted.bitmap_position.to_bytes(8, "big")
    os.pwrite(fd, bytes(head), start)
    write_bitmap(fd, shifted, np.array([True, False, True, False]))
    tail = encode_tail((), LATE, b"{}", switchover_start=False)
    os.pwrite(fd, layout.pieces[1][1] + tail, block.end_position)
    contents = read_contents(fd, "file", position=start)
    assert contents.blocks == (shifted,)
    assert contents.late == LATE
    assert read_bitmap(fd, shifted).tolist() == [True, False, True, False]
    os.close(fd)


def test_sections_keep_their_phase(read: Callable[[bytes], Contents], stored: bytes) -> None:
    setup = [section("dirty-bitmap", b"\x01", kind=START, section_id=40)]
    late = [
        section("dirty-bitmap", b"\x01", kind=PART, section_id=40),
        section("dirty-bitmap", b"\x01", kind=END, section_id=40),
        *LATE,
    ]
    layout = plan_layout(CONFIGURATION, EARLY, BLOCKS, PAGE)
    tail = encode_tail(setup, late, b"{}", switchover_start=True)
    contents = read(stored[: layout.tail_position] + tail)
    assert list(contents.early) == [*EARLY, *setup]
    # PART and END carry no name or instance on the wire: those of their START.
    assert list(contents.late) == late


def test_a_guest_over_the_limit_is_refused_before_anything_is_read(
    stored: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(stored)
    fd = os.open(path, os.O_RDONLY)
    total = sum(length for _, length in BLOCKS)
    read_contents(fd, "file", ram_limit_bytes=total)
    with pytest.raises(StoreError, match=f"{total} bytes of RAM, the limit is {total - 1}"):
        read_contents(fd, "file", ram_limit_bytes=total - 1)
    os.close(fd)


def replaced(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def be64(value: int) -> bytes:
    return value.to_bytes(8, "big")


LAYOUT = plan_layout(CONFIGURATION, EARLY, BLOCKS, PAGE)
FIRST_BITMAP = LAYOUT.blocks[0].bitmap_position
LIST = FIRST_BITMAP - 28 - 8 - 7 - 8


@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        (0, b"QEVM\0\0\0\x02", "stream version 2"),
        (0, b"\x7fELF", "Not a migration stream"),
        (8, b"\x01", "has no configuration"),
        (LIST, be64(0x0008), "no RAM block list"),
        (LIST, be64(700 * PAGE | 4), "mapped-ram header version"),
        (LIST, be64((1 << 62) | 4), "the limit is 17592186044416"),
        (LIST, be64(5 * PAGE | 4), "does not add up"),
        (FIRST_BITMAP - 36, be64(0), "lies outside"),
        (FIRST_BITMAP - 36, be64(599 * PAGE + 1), "lies outside"),
        (FIRST_BITMAP - 36, be64((1 << 64) - PAGE), "lies outside"),
        (FIRST_BITMAP - 28, b"\0\0\0\x02", "header version 2"),
        (FIRST_BITMAP - 24, be64(8192), "pages of 8192 bytes"),
        (FIRST_BITMAP - 16, be64(0), "lies outside"),
        (FIRST_BITMAP - 16, be64(MIB), "lies outside"),
        (FIRST_BITMAP - 16, be64((1 << 64) - 8), "lies outside"),
        (FIRST_BITMAP - 8, be64(FIRST_BITMAP), "lies outside"),
        (FIRST_BITMAP - 8, be64(MIB + 1), "lies outside"),
        (FIRST_BITMAP - 8, be64(1 << 40), "lies outside"),
        (FIRST_BITMAP - 8, be64((1 << 64) - PAGE), "lies outside"),
        (LAYOUT.blocks[1].end_position + 8, be64(1 << 50), "lies outside"),
        (LAYOUT.tail_position, b"\x55", "unknown element type 0x55"),
    ],
)
def test_a_bad_place_or_length_is_refused(
    stored: bytes,
    read: Callable[[bytes], Contents],
    position: int,
    new: bytes,
    message: str,
) -> None:
    with pytest.raises(StoreError, match=message):
        read(replaced(stored, position, new))


@pytest.mark.parametrize(
    "length",
    [0, 7, 40, LIST + 4, FIRST_BITMAP + 3, MIB + 5, LAYOUT.tail_position, LAYOUT.tail_position + 9],
)
def test_a_short_file_is_refused(
    stored: bytes, read: Callable[[bytes], Contents], length: int
) -> None:
    with pytest.raises(StoreError, match="'file'"):
        read(stored[:length])


def test_an_error_names_the_position_in_the_file(
    stored: bytes, read: Callable[[bytes], Contents]
) -> None:
    with pytest.raises(StoreError, match=f"position {LAYOUT.tail_position}"):
        read(replaced(stored, LAYOUT.tail_position, b"\x55"))


def test_a_plain_stream_is_not_taken_for_a_file_with_places(
    stored: bytes, read: Callable[[bytes], Contents]
) -> None:
    at = stored.index(b"\x0amapped-ram")
    with pytest.raises(StoreError, match="plain migration stream"):
        read(replaced(stored, at, b"\x0amapped-rim"))


def test_a_file_whose_ram_is_elsewhere_is_refused(read: Callable[[bytes], Contents]) -> None:
    head = LAYOUT.pieces[0][1].replace(
        b"\0\0\0\x01\x0amapped-ram", b"\0\0\0\x02\x0amapped-ram\x0fx-ignore-shared"
    )
    with pytest.raises(StoreError, match="x-ignore-shared is not taken"):
        read(head)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(
    stored: bytes, read: Callable[[bytes], Contents], data: st.DataObject
) -> None:
    places = [position for position, _ in LAYOUT.pieces] + [LAYOUT.tail_position]
    mutated = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(places)) + data.draw(st.integers(0, 250))
        if at < len(mutated):
            mutated[at] = data.draw(st.integers(0, 255))
    try:
        contents = read(bytes(mutated))
    except StoreError:
        return
    for block in contents.blocks:
        assert block.end_position <= len(stored)
        assert block.bitmap_position + block.bitmap_bytes <= block.pages_position

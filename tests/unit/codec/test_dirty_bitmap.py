"""Chunks of dirty bitmaps: literal bytes, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.codec.dirty_bitmap import (
    SECTION,
    BitmapReader,
    BitmapWriter,
    Bits,
    Chunk,
    Complete,
    Start,
    dirty_count,
)
from migrationd.errors import StreamCorrupt

START = bytes.fromhex("1c026e3003626d3100001000011403626d30000100000101")
BEGINS = bytes.fromhex("1c026e3003626d310000100001")


def with_bitmap(rest: str) -> list[Chunk]:
    reader = BitmapReader()
    reader.read(BEGINS + b"\1")
    return reader.read(bytes.fromhex(rest))


def test_a_start_section_as_seen() -> None:
    chunks = BitmapReader().read(START)
    assert chunks == [
        Chunk("n0", "bm1", Start(4096, 1)),
        Chunk("n0", "bm0", Start(65536, 1)),
    ]
    assert BitmapWriter().write(chunks) == START


def test_names_stay_the_same_from_one_section_to_the_next() -> None:
    bits = Bits(8, 16, b"\3" + bytes(31))
    assert with_bitmap(f"40 0000000000000008 00000010 {32:016x} 03{'00' * 31} 01") == [
        Chunk("n0", "bm1", bits)
    ]
    assert with_bitmap("42 0000000000000008 00000010 20 01")[1:] == [Chunk("n0", "bm1", Complete())]
    assert dirty_count(bits, 4096) == 2


def test_bits_behind_the_stretch_do_not_count() -> None:
    assert dirty_count(Bits(0, 8, b"\xff" * 32), 4096) == 1
    assert dirty_count(Bits(0, 1 << 20, None), 4096) == 0


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("81 0001 01", "unknown chunk flags"),
        ("50 01", "unknown chunk flags"),
        ("00 01", "unknown chunk flags"),
        ("0c 00 00 01", "the name"),
        ("0c 02 6e30 02 6100 01", "the name"),
        ("28 02 6e31 01", "names no bitmap"),
        ("24 01 78 01", "'x' of node 'n0' is not under way"),
        ("20 20 01", "is not under way"),
        ("14 03 626d31 00001000 01 01", "begins twice"),
        ("14 01 78 00001001 01 01", "granularity 4097"),
        ("14 01 78 00000100 01 01", "granularity 256"),
        ("14 01 78 00001000 08 01", "flags 0x8"),
        ("42 ffffffffffffffff 00000001 01", "sectors at sector"),
        (f"40 {0:016x} 00001000 {1:016x} ff 01", "1 bytes for 4096 sectors"),
        (f"40 {0:016x} 00001000 {10241:016x}", "a chunk of 10241 bytes"),
        (f"40 {0:016x} 00001000 {64:016x} ff", "ends inside a chunk"),
        ("01 01", "1 bytes behind the last chunk"),
        ("", "ends inside a chunk"),
    ],
)
def test_what_is_refused(rest: str, message: str) -> None:
    with pytest.raises(StreamCorrupt, match=message) as caught:
        with_bitmap(rest)
    assert caught.value.section == SECTION


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    reader = BitmapReader()
    try:
        reader.read(BEGINS + b"\1")
        chunks = reader.read(body)
    except StreamCorrupt:
        return
    again = BitmapReader()
    again.read(BEGINS + b"\1")
    assert again.read(BitmapWriter().write(chunks)) == chunks

"""Any input gives records or a StreamError, in bounded memory and time."""

import json
import random
import tracemalloc
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrationd.codec.records import (
    MixedBatch,
    PageBatch,
    Record,
    XbzrleBatch,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.codec.return_path import ReturnPathDecoder
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.codec.vmdescription import device_sizes
from migrationd.errors import StreamError
from migrationd.pageops.xbzrle import decode_page
from tests.conformance.captures import captures
from tests.support.fuzzing import cases

LIMITS = StreamLimits(
    ram_bytes=64 << 20, section_bytes=1 << 20, package_bytes=1 << 20, description_bytes=1 << 20
)
FUZZ = settings(max_examples=cases(300))
SEEDS = [
    "72-nofooter-pc.c0.fwd",
    "72-precopy-pc-2.2.c0.fwd",
    "72-postcopy-pc.c0.fwd",
    "100-noconfig-novmdesc-pc.c0.fwd",
    "100-dirty-bitmaps-postcopy-pc.c0.fwd",
    "100-multifd-none-pc.c0.fwd",
    "111-ignore-shared-q35.c0.fwd",
]


@cache
def seed(name: str) -> bytes:
    return next(c.data() for c in captures("main stream") if c.name == name)


def drain(data: bytes, piece: int = 1 << 20) -> int:
    """Decode to the end or the error; the number of records."""
    decoder = StreamDecoder(LIMITS)
    count = 0
    try:
        for start in range(0, len(data), piece):
            decoder.feed(data[start : start + piece])
            while (record := decoder.next_record()) is not None:
                check(decoder, record)
                count += 1
        decoder.idle()
        while (record := decoder.next_record()) is not None:
            count += 1
        decoder.feed_eof()
        while (record := decoder.next_record()) is not None:
            count += 1
    except StreamError as error:
        with pytest.raises(type(error)) as again:
            decoder.next_record()
        assert again.value.position is not None
    return count


def check(decoder: StreamDecoder, record: Record) -> None:
    """What a consumer relies on: pages lie inside their block."""
    if isinstance(record, PageBatch | ZeroBatch | MixedBatch | XbzrleBatch):
        pages = list(record.pages)
    elif isinstance(record, XbzrlePage):
        pages = [record.page]
    else:
        return
    limit = decoder.blocks[record.block].used_length // decoder.page_size
    assert pages
    assert 0 <= min(pages) <= max(pages) < limit
    if isinstance(record, PageBatch):
        assert record.data.shape == (len(pages), decoder.page_size)


def exhaust(decoder: StreamDecoder) -> None:
    while decoder.next_record():
        pass


def feed_zeros(decoder: StreamDecoder, pieces: int) -> None:
    for _ in range(pieces):
        decoder.feed(bytes(65_536))
        exhaust(decoder)


def mutate(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.choice(
            [chance.randrange(len(out)), chance.randrange(400), -chance.randrange(1, 40_000)]
        ) % len(out)
        match chance.randrange(5):
            case 0:
                out[at] = chance.randrange(256)
            case 1:
                out[at] ^= 1 << chance.randrange(8)
            case 2:
                del out[at : at + chance.randrange(1, 5000)]
            case 3:
                out[at:at] = out[: chance.randrange(1, 500)]
            case _:
                out[at : at + 8] = chance.choice(
                    [b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"\0\0\0\0\x80\0\0\0"]
                )
    return bytes(out)


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_streams(name: str) -> None:
    data = seed(name)
    chance = random.Random(name)
    for _ in range(cases(250)):
        drain(mutate(data, chance), chance.choice([1 << 20, 65_536, 4099]))


@FUZZ
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    drain(data)
    drain(b"QEVM\0\0\0\3" + data, piece=7)


RAM_START = (
    b"QEVM\0\0\0\3\x07\0\0\0\2pc\x01\0\0\0\1\x03ram\0\0\0\0\0\0\0\4"
    + ((16 << 12) | 4).to_bytes(8, "big")
    + b"\x01a"
    + (16 << 12).to_bytes(8, "big")
)


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.integers(0, 17),
            st.sampled_from([0x02, 0x08, 0x22, 0x28, 0x48, 0x60, 0x120, 0x10, 0x200, 0x228]),
            st.sampled_from([b"", b"\0", b"\1a", b"\1a\0", bytes(4096), b"\1a" + bytes(4096)]),
        ),
        max_size=80,
    )
)
def test_random_ram_records(rows: list[tuple[int, int, bytes]]) -> None:
    body = b"".join((page << 12 | flags).to_bytes(8, "big") + tail for page, flags, tail in rows)
    counts = {drain(RAM_START + body, piece) > 0 for piece in (1 << 20, 13)}
    assert counts == {True}


@FUZZ
@given(st.binary(max_size=200))
def test_random_return_path(data: bytes) -> None:
    decoder = ReturnPathDecoder(bitmap_limit_bytes=64)
    with suppress(StreamError):
        for byte in data:
            decoder.feed(bytes([byte]))


@FUZZ
@given(st.binary(max_size=64), st.integers(16, 128))
def test_random_xbzrle(encoded: bytes, size: int) -> None:
    page = bytearray(size)
    with suppress(ValueError):
        decode_page(encoded, page)
    assert len(page) == size


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["devices", "name", "instance_id", "fields", "size", "array_len", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@FUZZ
@given(JSON_VALUES)
def test_random_description(value: object) -> None:
    for devices in (value, [value]):
        with suppress(ValueError):
            device_sizes(json.dumps({"devices": devices}).encode())


def test_lengths_are_checked_before_anything_is_allocated() -> None:
    greedy = [
        b"QEVM\0\0\0\3\x07\xff\xff\xff\xff",
        b"QEVM\0\0\0\3\x07\0\0\0\1x\x08\0\x07\0\x04\xff\xff\xff\xff",
        b"QEVM\0\0\0\3\x07\0\0\0\1x\0\x06\xff\xff\xff\xff{",
        b"QEVM\0\0\0\3\x07\0\0\0\1x\x01\0\0\0\1\x03ram\0\0\0\0\0\0\0\4\x7f" + b"\xff" * 6 + b"\x04",
    ]
    tracemalloc.start()
    try:
        for data in greedy:
            decoder = StreamDecoder(LIMITS)
            decoder.feed(data)
            with pytest.raises(StreamError):
                exhaust(decoder)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_device_without_end_is_bounded() -> None:
    decoder = StreamDecoder(LIMITS)
    decoder.feed(b"QEVM\0\0\0\3\x07\0\0\0\1x\x04\0\0\0\1\x03dev\0\0\0\0\0\0\0\1")
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="no end of the section"):
            feed_zeros(decoder, 1000)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()

"""Packets as they are written and read, and headers that lie."""

import struct

import numpy as np
import pytest

from migrationd.codec.multifd import (
    FIXED_BYTES,
    Hello,
    PacketDecoder,
    PacketEncoder,
    block_name,
    decode_hello,
    encode_hello,
    header_bytes,
    set_data_bytes,
)
from migrationd.errors import StreamCorrupt, StreamUnsupported

PAGE = 4096


def packet(**fields: int) -> bytes:
    values = {
        "magic": 0x11223344, "version": 1, "flags": 0, "allocated": 128, "normal": 0, "size": 0,
        "number": 0, "zero": 0,
    } | fields  # fmt: skip
    return struct.pack(">IIIIIIQI", *values.values()).ljust(header_bytes(PAGE), b"\0")


def test_a_hello_survives() -> None:
    data = encode_hello(Hello(254, bytes(range(16))))
    assert len(data) == 64
    assert data[:8] == bytes.fromhex("1122334400000001")
    assert decode_hello(data) == Hello(254, bytes(range(16)))


def test_the_header_has_one_size() -> None:
    assert header_bytes(4096) == 1344
    assert header_bytes(65536) == 320 + 8 * 8


@pytest.mark.parametrize("is_zero", [False, True])
def test_headers_of_many_packets_decode_again(is_zero: bool) -> None:
    encoder, decoder = PacketEncoder(PAGE, "none"), PacketDecoder(0, PAGE, "none")
    for count in (300, 300, 256, 1):
        pages = np.sort(np.random.default_rng(count).choice(2000, count, replace=False))
        headers = encoder.headers("pc.ram", pages, (1 << 32) - 1, is_zero=is_zero)
        assert headers.shape == (-(-count // 128), 1344)
        seen: list[int] = []
        for row in headers:
            data = row.tobytes()
            head = decoder.decode(data)
            assert block_name(head.ramblock) == "pc.ram"
            assert head.data_bytes == head.normal_pages * PAGE
            assert bool(head.zero_pages) == is_zero
            assert bool(head.normal_pages) != is_zero
            seen += decoder.offsets(data, head, 2000 * PAGE, "pc.ram").tolist()
            assert not np.frombuffer(data, ">u8", offset=320)[head[2] + head[3] :].any()
        assert seen == pages.tolist()


def test_a_run_is_noticed_and_nothing_else() -> None:
    encoder, decoder = PacketEncoder(PAGE, "none"), PacketDecoder(0, PAGE, "none")
    for pages, run in (
        (np.arange(872, 1000), 872),
        (np.arange(5, 6), 5),
        (np.array([7, 9, 8]), -1),
        (np.arange(873, 1001), -1),
        (np.array([3, 3]), -1),
    ):
        data = encoder.headers("a", pages, 0, is_zero=False)[0].tobytes()
        assert decoder.run(data, decoder.decode(data), 1000 * PAGE) == run
    data = encoder.headers("a", np.arange(4), 0, is_zero=True)[0].tobytes()
    assert decoder.run(data, decoder.decode(data), 1000 * PAGE) == -1


def test_runs_anywhere_are_noticed_one_after_the_other() -> None:
    encoder, decoder = PacketEncoder(PAGE, "none"), PacketDecoder(0, PAGE, "none")
    used = 1 << 40
    for first in (0, 128, 1920, 1921, 1984, 2048, 5000, 4999, 0, 100_000, (used // PAGE) - 128):
        pages = np.arange(first, first + 128)
        data = bytearray(encoder.headers("a", pages, first, is_zero=False)[0])
        assert decoder.run(data, decoder.decode(data), used) == first
        data[320 + 8 * 77 + 6] ^= 0x10
        assert decoder.run(data, decoder.decode(data), used) == -1


def test_a_header_like_the_one_before_is_still_read() -> None:
    encoder, decoder = PacketEncoder(PAGE, "none"), PacketDecoder(0, PAGE, "none")
    header = bytearray(encoder.headers("a", np.arange(128), 7, is_zero=False)[0])
    before = decoder.decode(header)
    header[24:32] = (8).to_bytes(8, "big")
    assert decoder.decode(header) == before
    assert decoder.decode(encoder.sync(9)).is_sync
    assert decoder.decode(header) == before
    header[64] = ord("b")
    assert block_name(decoder.decode(header).ramblock) == "b"
    header[0] = 0
    with pytest.raises(StreamCorrupt, match="magic"):
        decoder.decode(header)
    with pytest.raises(StreamCorrupt, match="magic"):
        decoder.decode(header)


def test_sync_packets() -> None:
    encoder, decoder = PacketEncoder(PAGE, "zstd"), PacketDecoder(0, PAGE, "zstd")
    head = decoder.decode(encoder.sync(9))
    assert head.is_sync
    assert (head.normal_pages, head.zero_pages, head.data_bytes) == (0, 0, 0)
    # 7.2: with pages, or empty with a stale size and without the method.
    full = decoder.decode(packet(flags=0x05, normal=128, size=77))
    assert full.is_sync
    assert (full.normal_pages, full.data_bytes) == (128, 77)
    assert decoder.decode(packet(flags=1, size=77)).data_bytes == 0


def test_the_size_of_a_compressed_packet_is_written_in_place() -> None:
    encoder, decoder = PacketEncoder(PAGE, "zlib"), PacketDecoder(0, PAGE, "zlib")
    headers = encoder.headers("a", np.arange(5), 0, is_zero=False)
    set_data_bytes(headers[0], 321)
    assert decoder.decode(headers[0].tobytes()).data_bytes == 321
    again = encoder.headers("a", np.arange(5), 0, is_zero=False)
    assert decoder.decode(again[0].tobytes()).data_bytes == 5 * PAGE


@pytest.mark.parametrize(
    ("method", "data", "text"),
    [
        ("none", packet(magic=0x11223345), "magic"),
        ("none", packet(version=2), "version 2"),
        ("none", packet(flags=0x80), "flags 0x80"),
        ("none", packet(allocated=129), "the most are 128"),
        ("none", packet(normal=100, zero=29, size=100 * PAGE), r"100 \+ 29 pages of 128"),
        ("none", packet(normal=0xFFFFFFFF, zero=1), "pages of 128"),
        ("none", packet(normal=1, size=PAGE + 1), "4097 bytes for 1 pages"),
        ("none", packet(flags=2, normal=1, size=PAGE), "compressed with 'zlib'"),
        ("zlib", packet(normal=1, size=PAGE), "compressed with 'none'"),
        ("zlib", packet(flags=2, normal=1, size=0), "0 compressed bytes"),
        ("zstd", packet(flags=4, normal=1, size=(1 << 20) + 1), "1048577 compressed bytes"),
    ],
)
def test_headers_that_lie(method: str, data: bytes, text: str) -> None:
    with pytest.raises(StreamCorrupt, match=text):
        PacketDecoder(3, PAGE, method).decode(data)


@pytest.mark.parametrize("offset", [10 * PAGE, 1, (1 << 64) - PAGE, 9 * PAGE + 2048])
def test_offsets_outside_the_block_or_between_pages(offset: int) -> None:
    decoder = PacketDecoder(3, PAGE, "none")
    data = bytearray(packet(normal=1, zero=1, size=PAGE))
    data[FIXED_BYTES + 8 : FIXED_BYTES + 16] = offset.to_bytes(8, "big")
    with pytest.raises(StreamCorrupt, match=f"page at {offset:#x} .* 'multifd channel 3'"):
        decoder.offsets(data, decoder.decode(data), 10 * PAGE, "ram")


def test_device_state_is_refused_with_a_hint() -> None:
    with pytest.raises(StreamUnsupported, match="x-migration-multifd-transfer"):
        PacketDecoder(0, PAGE, "none").decode(packet(flags=0x40))

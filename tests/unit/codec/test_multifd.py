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


def test_headers_of_many_packets_decode_again() -> None:
    normal, zero = np.arange(1000, 1300), np.arange(7, 7 + 129)
    headers = PacketEncoder(PAGE, "none").headers("pc.ram", normal, zero, (1 << 32) - 1)
    assert headers.shape == (5, 1344)
    decoder = PacketDecoder(0, PAGE, "none")
    seen: list[tuple[list[int], list[int]]] = []
    for row in headers:
        head = decoder.decode(row.tobytes())
        assert block_name(head.ramblock) == "pc.ram"
        assert head.number == (1 << 32) - 1 + len(seen)
        assert head.data_bytes == head.normal_pages * PAGE
        pages = decoder.offsets(row.tobytes(), head, 2000 * PAGE, "pc.ram").tolist()
        seen.append((pages[: head.normal_pages], pages[head.normal_pages :]))
    assert [page for packet in seen for page in packet[0]] == normal.tolist()
    assert [page for packet in seen for page in packet[1]] == zero.tolist()
    assert [len(packet[0]) for packet in seen] == [128, 128, 44, 0, 0]


def test_sync_packets() -> None:
    encoder, decoder = PacketEncoder(PAGE, "zstd"), PacketDecoder(0, PAGE, "zstd")
    head = decoder.decode(encoder.sync(9))
    assert head.is_sync
    assert (head.number, head.normal_pages, head.zero_pages, head.data_bytes) == (9, 0, 0, 0)
    # 7.2: with pages, or empty with a stale size and without the method.
    full = decoder.decode(packet(flags=0x05, normal=128, size=77))
    assert full.is_sync
    assert (full.normal_pages, full.data_bytes) == (128, 77)
    assert decoder.decode(packet(flags=1, size=77)).data_bytes == 0


def test_the_size_of_a_compressed_packet_is_written_in_place() -> None:
    headers = PacketEncoder(PAGE, "zlib").headers("a", np.arange(5), np.arange(0), 0)
    set_data_bytes(headers[0], 321)
    assert PacketDecoder(0, PAGE, "zlib").decode(headers[0].tobytes()).data_bytes == 321


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

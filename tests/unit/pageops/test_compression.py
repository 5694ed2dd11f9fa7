"""Packets through one endless stream, and what a hostile one may try."""

import os
import zlib

import pytest
from backports import zstd

from migrationd.pageops.compress import Compressor, compressor
from migrationd.pageops.decompress import Decompressor, decompressor

PACKET = 512 << 10


def pair(method: str, level: int = 1) -> tuple[Compressor, Decompressor]:
    compress, decompress = compressor(method, level), decompressor(method)
    assert compress is not None
    assert decompress is not None
    return compress, decompress


def test_none_has_no_state() -> None:
    assert compressor("none", 1) is None
    assert decompressor("none") is None


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_each_packet_is_complete(method: str, level: int) -> None:
    compress, decompress = pair(method, level)
    packets = [bytes(PACKET), os.urandom(PACKET), os.urandom(4096), b"page" * 1024, bytes(4096)]
    for packet in packets * 2:
        compressed = compress(memoryview(packet))
        assert len(compressed) < 1 << 20
        assert decompress(memoryview(compressed), len(packet)) == packet


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_later_packet_leans_on_an_earlier_one(method: str) -> None:
    compress, decompress = pair(method)
    packet = os.urandom(16 << 10)
    first, second = compress(memoryview(packet)), compress(memoryview(packet))
    assert len(second) < len(first) // 10
    with pytest.raises(ValueError, match=r"."):
        decompress(memoryview(second), len(packet))


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_bomb_makes_no_more_than_a_byte_too_much(method: str) -> None:
    compress, decompress = pair(method)
    bomb = compress(memoryview(bytes(64 << 20)))
    assert len(bomb) < 1 << 20
    with pytest.raises(ValueError, match="more than 4096 bytes where 4096"):
        decompress(memoryview(bomb), 4096)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_too_little(method: str) -> None:
    compress, decompress = pair(method)
    with pytest.raises(ValueError, match="4096 bytes where 8192"):
        decompress(memoryview(compress(memoryview(bytes(4096)))), 8192)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_rubbish(method: str) -> None:
    _, decompress = pair(method)
    with pytest.raises(ValueError, match=r"."):
        decompress(memoryview(b"\xff" * 100), 4096)


def test_streams_that_end_are_refused() -> None:
    _, decompress = pair("zlib")
    with pytest.raises(ValueError, match="ends"):
        decompress(memoryview(zlib.compress(bytes(4096))), 4096)
    _, decompress = pair("zstd")
    with pytest.raises(ValueError, match="ends"):
        decompress(memoryview(zstd.compress(bytes(4096))), 4096)
    with pytest.raises(ValueError, match="behind the end"):
        decompress(memoryview(b"more"), 4096)


def test_a_zstd_window_beyond_the_limit_is_refused() -> None:
    stream = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.window_log: 28,
            zstd.CompressionParameter.compression_level: 1,
        }
    )
    data = stream.compress(bytes(4096), mode=zstd.ZstdCompressor.FLUSH_BLOCK)
    _, decompress = pair("zstd")
    with pytest.raises(ValueError, match=r"(?i)memory|window"):
        decompress(memoryview(data), 4096)

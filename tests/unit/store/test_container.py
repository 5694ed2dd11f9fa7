import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from migrationd.errors import StoreError, StreamTruncated
from migrationd.store.compressed import Compressor, PlainStream
from migrationd.store.container import open_file, read_container
from migrationd.store.libvirt_image import LibvirtImage, encode_libvirt_image
from tests.unit.store.guests import store_guest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STREAM = b"QEVM\0\0\0\x03" + bytes(range(256)) * 9000


def stream_of(data: bytes, tmp_path: Path) -> tuple[str, bytes]:
    """The file's form and its plain stream."""
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = open_file(path)
    try:
        container = read_container(fd, "file")
        found = bytearray()
        view = memoryview(bytearray(65536))
        with PlainStream(fd, container, "file") as stream:
            while count := stream.channel.recv_into(view, 10):
                found += view[:count]
        if stream.error is not None:
            raise stream.error
        return container.form, bytes(found)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("zstd", zstd.compress),
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
    ],
)
def test_compressed_streams_are_read(
    name: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    form = f"plain stream, compressed by {name}"
    assert stream_of(compress(STREAM), tmp_path) == (form, STREAM)
    halves = compress(STREAM[:1000]) + compress(STREAM[1000:])
    assert stream_of(halves + bytes(100), tmp_path) == (form, STREAM)
    with pytest.raises(StoreError, match="ends too early"):
        stream_of(compress(STREAM)[:-9], tmp_path)


def test_plain_streams_and_save_images(tmp_path: Path) -> None:
    assert stream_of(STREAM, tmp_path) == ("plain stream", STREAM)
    head = encode_libvirt_image(LibvirtImage(b"<domain/>", was_running=True))
    form, found = stream_of(head + gzip.compress(STREAM), tmp_path)
    assert form == "libvirt save image of a plain stream, compressed by gzip"
    assert found == STREAM


def test_a_mapped_ram_file_is_told_apart(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    fd = open_file(path)
    assert read_container(fd, "file").is_mapped_ram
    os.close(fd)


def test_damage_is_a_store_error_even_where_the_stream_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    damaged = bytearray(gzip.compress(os.urandom(100_000)))
    damaged[50_000:50_100] = bytes(100)
    path.write_bytes(damaged)
    fd = open_file(path)

    def read() -> None:
        with PlainStream(fd, read_container(fd, "file"), "file") as stream:
            view = memoryview(bytearray(65536))
            while stream.channel.recv_into(view, 10):
                pass
            raise StreamTruncated("the input ended")

    with pytest.raises(StoreError, match="cannot be decompressed"):
        read()
    os.close(fd)


def test_a_bomb_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    """256 MiB of zeros in a few KiB: nothing holds more than its own window of them."""
    path = tmp_path / "file"
    worker = zstd.ZstdCompressor()
    with path.open("wb") as file:
        for _ in range(256):
            file.write(worker.compress(bytes(1 << 20)))
        file.write(worker.flush())
    fd = open_file(path)
    total = 0
    view = memoryview(bytearray(1 << 20))
    with PlainStream(fd, read_container(fd, "file"), "file") as stream:
        while count := stream.channel.recv_into(view, 10):
            total += count
    os.close(fd)
    assert total == 256 << 20


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x89LZO\0\r\n\x1a\n" + bytes(20), "lzop cannot be read"),
        (b"#!/bin/sh\n", "Not a migration stream"),
    ],
)
def test_other_files_are_refused(data: bytes, text: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=text):
        stream_of(data, tmp_path)


def test_a_directory_and_a_fifo_are_no_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo):
        with pytest.raises(StoreError, match="no regular file"):
            open_file(path)
    with pytest.raises(StoreError, match="No such file"):
        open_file(tmp_path / "none")


def test_compressor_round_trip_and_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    compressor = Compressor(fd, 3)
    compressor.channel.send(STREAM)
    compressor.finish()
    os.close(fd)
    assert stream_of(path.read_bytes(), tmp_path)[1] == STREAM

    full = os.open("/dev/full", os.O_WRONLY)
    compressor = Compressor(full, 3)
    compressor.channel.send(b"x")
    with pytest.raises(StoreError, match="No space left"):
        compressor.finish()
    os.close(full)

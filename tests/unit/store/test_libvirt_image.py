import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from migrationd.errors import StoreError
from migrationd.store.libvirt_image import (
    DATA_LIMIT_BYTES,
    HEADER_BYTES,
    LibvirtImage,
    encode_libvirt_image,
    is_libvirt_image,
    read_libvirt_image,
)

XML = b"<domain type='qemu'><name>vm</name></domain>\n"
Read = Callable[[bytes], LibvirtImage]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_bytes(data: bytes) -> LibvirtImage:
        path = tmp_path / "image"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_libvirt_image(fd, "image")
        finally:
            os.close(fd)

    return read_bytes


@pytest.mark.parametrize("cookie", [None, b"<cookie/>\n"])
def test_what_was_written_is_read(cookie: bytes | None, read: Read) -> None:
    image = LibvirtImage(XML, was_running=True, compression="zstd", cookie_xml=cookie)
    head = encode_libvirt_image(image, align=4096)
    assert is_libvirt_image(head)
    found = read(head + b"stream")
    assert found.domain_xml == XML
    assert found.cookie_xml == cookie
    assert found.was_running
    assert found.compression == "zstd"
    assert found.stream_position == len(head) == 4096


def test_the_layout_is_libvirts() -> None:
    head = encode_libvirt_image(LibvirtImage(XML, was_running=False))
    assert head[:16] == b"LibvirtQemudSave"
    assert struct.unpack("=5I", head[16:36]) == (2, len(XML) + 1, 0, 0, 0)
    assert not any(head[36:HEADER_BYTES])
    assert head[HEADER_BYTES:] == XML + b"\0"


def test_an_image_of_the_other_byte_order(read: Read) -> None:
    head = bytearray(encode_libvirt_image(LibvirtImage(XML, was_running=True)))
    for at in range(16, 36, 4):
        head[at : at + 4] = head[at : at + 4][::-1]
    assert read(bytes(head)).domain_xml == XML


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (16, 3, "version 3"),
        (20, 0, "0 bytes of XML"),
        (20, DATA_LIMIT_BYTES + 1, "the limit is"),
        (20, 4096, "ends inside its XML"),
        (28, 7, "compression 7"),
        (32, 46, "the cookie at 46"),
    ],
)
def test_hostile_numbers_are_refused(at: int, value: int, text: str, read: Read) -> None:
    head = bytearray(encode_libvirt_image(LibvirtImage(XML, was_running=True)))
    head[at : at + 4] = struct.pack("=I", value)
    with pytest.raises(StoreError, match=text):
        read(bytes(head))


def test_an_unfinished_image_and_a_short_one_are_refused(read: Read) -> None:
    image = LibvirtImage(XML, was_running=True)
    with pytest.raises(StoreError, match="did not finish"):
        read(encode_libvirt_image(image, partial=True))
    with pytest.raises(StoreError, match="no complete"):
        read(encode_libvirt_image(image)[:40])


def test_too_much_xml_is_refused() -> None:
    with pytest.raises(StoreError, match="the limit is"):
        encode_libvirt_image(LibvirtImage(bytes(DATA_LIMIT_BYTES), was_running=True))

"""libvirt's save image: what ``virsh save`` writes and ``virsh restore`` reads.

    16 bytes magic   LibvirtQemudSave, or LibvirtQemudPart while it is being written
    u32 version 2    u32 data length   u32 was running   u32 compression   u32 cookie offset
    14 u32 unused
    data             domain XML, NUL; at the cookie offset another XML document, NUL
    stream           the migration stream, maybe compressed

Numbers have the byte order of the host that wrote the image. The domain XML is libvirt's
own and says how QEMU has to be started; nothing in it is interpreted here.
"""

import os
import struct
import sys
from dataclasses import dataclass

from migrationd.errors import StoreError

MAGIC = b"LibvirtQemudSave"
MAGIC_PARTIAL = b"LibvirtQemudPart"
VERSION = 2
HEADER_BYTES = 92
DATA_LIMIT_BYTES = 16 << 20
"""Domain XML and cookie; libvirt itself takes 16 MiB at most."""

COMPRESSIONS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
"""Names of the compression numbers; sparse is a mapped-ram file."""

_NUMBERS = struct.Struct("=5I56x")
_SWAPPED = {"little": struct.Struct(">5I56x"), "big": struct.Struct("<5I56x")}


@dataclass(frozen=True, slots=True)
class LibvirtImage:
    """Head of a save image.

    Attributes:
        domain_xml: The domain, without its NUL.
        was_running: Whether ``virsh restore`` starts it.
        compression: One of ``COMPRESSIONS``.
        cookie_xml: libvirt's further notes, without their NUL, or None.
        stream_position: Where the stream begins in the file.
    """

    domain_xml: bytes
    was_running: bool
    compression: str = "raw"
    cookie_xml: bytes | None = None
    stream_position: int = 0


def is_libvirt_image(head: bytes) -> bool:
    """Whether a file that begins so is a save image, whole or not."""
    return head[:16] in (MAGIC, MAGIC_PARTIAL)


def read_libvirt_image(fd: int, path: str) -> LibvirtImage:
    """Read the head of a save image.

    Raises:
        StoreError: It is none, is incomplete, or its numbers contradict the file.
    """
    head = os.pread(fd, HEADER_BYTES, 0)
    if head[:16] == MAGIC_PARTIAL:
        raise StoreError(f"'{path}': libvirt did not finish this save image")
    if head[:16] != MAGIC or len(head) < HEADER_BYTES:
        raise StoreError(f"'{path}' is no complete libvirt save image")
    version, length, was_running, compression, cookie = _unpack(head[16:])
    if version != VERSION:
        raise StoreError(f"'{path}': save image version {version}, only {VERSION} is known")
    if not 0 < length <= DATA_LIMIT_BYTES:
        raise StoreError(f"'{path}': {length} bytes of XML, the limit is {DATA_LIMIT_BYTES}")
    if compression >= len(COMPRESSIONS):
        raise StoreError(f"'{path}': compression {compression} is not known")
    if cookie >= length:
        raise StoreError(f"'{path}': the cookie at {cookie} lies outside {length} bytes of XML")
    data = os.pread(fd, length, HEADER_BYTES)
    if len(data) < length:
        raise StoreError(f"'{path}': the file ends inside its XML")
    end = cookie or length
    return LibvirtImage(
        domain_xml=data[:end].split(b"\0", 1)[0],
        was_running=bool(was_running),
        compression=COMPRESSIONS[compression],
        cookie_xml=data[cookie:].split(b"\0", 1)[0] if cookie else None,
        stream_position=HEADER_BYTES + length,
    )


def encode_libvirt_image(
    image: LibvirtImage, *, partial: bool = False, align: int | None = None
) -> bytes:
    """Everything before the stream.

    Args:
        image: What to write; its ``stream_position`` is not looked at.
        partial: Mark the image as one that is being written.
        align: Make the stream begin at a multiple of this many bytes.

    Raises:
        StoreError: The XML is too long.
    """
    data = image.domain_xml + b"\0"
    cookie = 0
    if image.cookie_xml is not None:
        cookie = len(data)
        data += image.cookie_xml + b"\0"
    if align is not None:
        data += bytes(-(HEADER_BYTES + len(data)) % align)
    if len(data) > DATA_LIMIT_BYTES:
        raise StoreError(f"{len(data)} bytes of domain XML, the limit is {DATA_LIMIT_BYTES}")
    return (
        (MAGIC_PARTIAL if partial else MAGIC)
        + _NUMBERS.pack(
            VERSION,
            len(data),
            image.was_running,
            COMPRESSIONS.index(image.compression),
            cookie,
        )
        + data
    )


def _unpack(numbers: bytes) -> tuple[int, int, int, int, int]:
    found: tuple[int, int, int, int, int] = _NUMBERS.unpack(numbers)
    if found[0] != VERSION:
        swapped: tuple[int, int, int, int, int] = _SWAPPED[sys.byteorder].unpack(numbers)
        if swapped[0] == VERSION:
            return swapped
    return found

"""What a migration file is wrapped in.

plain       QEVM…               a stream, or with its configuration's capability a mapped-ram file
zstd        28 b5 2f fd         a compressed plain stream; gzip, bzip2 and xz are read as well
libvirt     LibvirtQemudSave    save image: a head, then any of these
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.header import decode_configuration, decode_file_header
from migrationd.errors import StoreError, StreamError
from migrationd.store.libvirt_image import LibvirtImage, is_libvirt_image, read_libvirt_image
from migrationd.store.mapped_ram import CAPABILITY

_HEAD_BYTES = 64 << 10
_MAGICS = (
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x89LZO\0", "lzop"),
)


@dataclass(frozen=True, slots=True)
class Container:
    """How a file holds a guest.

    Attributes:
        compression: ``none``, ``zstd``, ``gzip``, ``bzip2``, ``xz`` or ``lzop``.
        is_mapped_ram: Whether pages have fixed places in it.
        position: Where the stream, or what it is compressed to, begins.
        libvirt: Head of libvirt's save image, or None.
        size: Bytes of the file.
        allocated: Bytes that it takes on disk.
    """

    compression: str
    is_mapped_ram: bool
    position: int
    libvirt: LibvirtImage | None
    size: int
    allocated: int

    @property
    def form(self) -> str:
        """In words."""
        form = "mapped-ram file" if self.is_mapped_ram else "plain stream"
        if self.compression != "none":
            form = f"{form}, compressed by {self.compression}"
        return f"libvirt save image of a {form}" if self.libvirt else form


def read_container(fd: int, path: str, *, position: int = 0) -> Container:
    """Look at the head of a file.

    Args:
        fd: File.
        path: Its name, for messages.
        position: Where to look (``file:PATH,offset=N``).

    Raises:
        StoreError: It holds nothing that is known here, or cannot be read.
    """
    try:
        status = os.fstat(fd)
        head = os.pread(fd, _HEAD_BYTES, position)
        libvirt = None
        if not position and is_libvirt_image(head):
            libvirt = read_libvirt_image(fd, path)
            position = libvirt.stream_position
            head = os.pread(fd, _HEAD_BYTES, position)
    except OSError as error:
        raise StoreError(f"'{path}': {error.strerror}") from error
    compression = next((name for magic, name in _MAGICS if head.startswith(magic)), "none")
    return Container(
        compression,
        compression == "none" and _is_mapped_ram(head, path, position),
        position,
        libvirt,
        status.st_size,
        status.st_blocks * 512,
    )


def open_file(path: Path) -> int:
    """Open a migration file for reading.

    Raises:
        StoreError: It cannot be opened, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(f"'{path}': {error.strerror}") from error
    if not path.is_file():
        os.close(fd)
        raise StoreError(f"'{path}' is no regular file")
    return fd


@contextlib.contextmanager
def opened(path: Path, *, position: int = 0) -> Iterator[tuple[int, Container]]:
    """A migration file: its descriptor, and what it is wrapped in.

    Args:
        path: The file; errors of its stream inside the block get its name.
        position: As for :func:`read_container`.

    Raises:
        StoreError: As :func:`open_file` and :func:`read_container`.
    """
    fd = open_file(path)
    try:
        yield fd, read_container(fd, str(path), position=position)
    except StreamError as error:
        error.message = f"'{path}': {error.message}"
        raise
    finally:
        os.close(fd)


def _is_mapped_ram(head: bytes, path: str, position: int) -> bool:
    buffer = ReadBuffer(len(head) + 1, len(head) + 1)
    buffer.feed(head)
    try:
        decode_file_header(buffer)
        if buffer.peek(1) != b"\x07":
            return False
        return CAPABILITY in (decode_configuration(buffer).capabilities or ())
    except NeedData:
        return False
    except StreamError as error:
        if error.position is not None:
            error.position += position
        raise StoreError(f"'{path}': {error}") from error

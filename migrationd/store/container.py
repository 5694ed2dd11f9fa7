"""What a migration file is wrapped in, and its stream without the wrapping.

plain       QEVM…               a stream, or with its configuration's capability a mapped-ram file
zstd        28 b5 2f fd         a compressed plain stream; gzip, bzip2 and xz are read as well
libvirt     LibvirtQemudSave    save image: a head, then any of these
"""

import bz2
import lzma
import os
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.header import decode_configuration, decode_file_header
from migrationd.errors import StoreError, StreamError
from migrationd.store.libvirt_image import LibvirtImage, is_libvirt_image, read_libvirt_image
from migrationd.store.mapped_ram import CAPABILITY
from migrationd.transport.channel import Channel

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_HEAD_BYTES = 64 << 10
_INPUT_BYTES = 1 << 20
_OUTPUT_BYTES = 1 << 20
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
        compression == "none" and _is_mapped_ram(head, path),
        position,
        libvirt,
        status.st_size,
        status.st_blocks * 512,
    )


class PlainStream:
    """The stream of a container as a channel; the work of a decompressor is a thread.

    Args:
        fd: File; stays the caller's.
        container: What it is.
        path: Its name, for messages.

    Raises:
        StoreError: There is no decompressor for it.
        ChannelError: The descriptor cannot be used.
    """

    def __init__(self, fd: int, container: Container, path: str) -> None:
        self._error: StoreError | None = None
        self._thread: threading.Thread | None = None
        if container.compression == "none":
            source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.lseek(source, container.position, os.SEEK_SET)
            self.channel = Channel(source)
            return
        make = _DECOMPRESSORS.get(container.compression)
        if make is None:
            raise StoreError(f"'{path}': {container.compression} cannot be read here")
        source, target = os.pipe2(os.O_CLOEXEC)
        self.channel = Channel(source)
        self._thread = threading.Thread(
            target=self._pump, args=(fd, target, container.position, make, path), daemon=True
        )
        self._thread.start()

    @property
    def error(self) -> StoreError | None:
        """What the decompressor could not do; the channel ended there."""
        return self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.channel.close()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and isinstance(error, StreamError):
            # That the stream ended early is the consequence.
            raise self._error from error

    def _pump(
        self, fd: int, target: int, position: int, make: Callable[[], "Decompressor"], path: str
    ) -> None:
        try:
            _decompress(fd, target, position, make)
        except BrokenPipeError:
            pass
        except EOFError:
            self._error = StoreError(f"'{path}': the compressed data ends too early")
        except (OSError, zstd.ZstdError, zlib.error, lzma.LZMAError, ValueError) as error:
            self._error = StoreError(f"'{path}': cannot be decompressed: {error}")
        finally:
            os.close(target)


class Decompressor(Protocol):
    """What the standard library's decompressors have in common."""

    @property
    def eof(self) -> bool:
        """Whether the end of the compressed data was reached."""

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed for more output."""

    @property
    def unused_data(self) -> bytes:
        """What was found behind the end."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many bytes."""


class _Gzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._inflater.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflater.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflater.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflater.decompress(self._inflater.unconsumed_tail + data, max_length)


_DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    "zstd": zstd.ZstdDecompressor,
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


def _decompress(fd: int, target: int, position: int, make: Callable[[], Decompressor]) -> None:
    """Write the decompressed data; members that follow one another are one stream.

    Raises:
        EOFError: The data ends inside a member.
        Exception: As the decompressor, and as the system's calls.
    """
    rest = b""
    while True:
        worker = make()
        while not worker.eof:
            data = b""
            if worker.needs_input:
                data = rest or os.pread(fd, _INPUT_BYTES, position)
                position += 0 if rest else len(data)
                rest = b""
                if not data:
                    raise EOFError
            output = memoryview(worker.decompress(data, _OUTPUT_BYTES))
            while output:
                output = output[os.write(target, output) :]
        rest = worker.unused_data or os.pread(fd, _INPUT_BYTES, position)
        position += 0 if worker.unused_data else len(rest)
        # libvirt pads with zeros, and so may anyone.
        if not rest.strip(b"\0"):
            return


class Compressor:
    """Compresses what is written to a channel into a file, on a thread.

    Args:
        fd: File, at the position where the data goes; stays the caller's.
        level: Of zstd.
    """

    def __init__(self, fd: int, level: int) -> None:
        self._fd = fd
        self._error: Exception | None = None
        self._source, target = os.pipe2(os.O_CLOEXEC)
        self.channel = Channel(target)
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.checksum_flag: 1,
            zstd.CompressionParameter.nb_workers: min(4, os.cpu_count() or 1),
        }
        self._worker = zstd.ZstdCompressor(options=options)
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Write the end.

        Raises:
            StoreError: The file could not be written.
        """
        self.channel.close()
        self._thread.join()
        if self._error is not None:
            raise StoreError(f"compressing: {self._error}") from self._error

    def _pump(self) -> None:
        try:
            while data := os.read(self._source, _INPUT_BYTES):
                self._write(self._worker.compress(data))
            self._write(self._worker.flush())
        except (OSError, zstd.ZstdError) as error:
            self._error = error
        finally:
            os.close(self._source)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


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


def _is_mapped_ram(head: bytes, path: str) -> bool:
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
        raise StoreError(f"'{path}': {error}") from error

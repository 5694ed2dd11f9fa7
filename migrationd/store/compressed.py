"""The stream of a migration file without its wrapping, and with one.

zstd, gzip, bzip2 and xz are read, zstd is written; members that follow one another are one stream.
"""

import bz2
import contextlib
import lzma
import os
import threading
import zlib
from collections.abc import Callable
from typing import Protocol

from migrationd.errors import StoreError, StreamError
from migrationd.pageops.zstandard import zstd
from migrationd.store.container import Container
from migrationd.transport.channel import Channel

_INPUT_BYTES = 1 << 20
_OUTPUT_BYTES = 1 << 20


class PlainStream(contextlib.AbstractContextManager["PlainStream"]):
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

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
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
            error = self._error
            reason = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"compressing: {reason}") from error

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

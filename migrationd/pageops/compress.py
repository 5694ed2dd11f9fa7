"""Page data compressed as one endless stream, packet by packet; the counterpart of decompress.

Reference: stream format 3.4; levels as QEMU's parameters, 0 means the library's default for zstd
and no compression for zlib.
"""

import zlib
from collections.abc import Callable

Compressor = Callable[[memoryview], bytes]
"""The pages of one packet -> what goes over the wire, complete up to its last byte."""


def compressor(method: str, level: int) -> Compressor | None:
    """State of one channel; None for ``none``.

    Args:
        method: ``none``, ``zlib`` or ``zstd``.
        level: Of that method.
    """
    if method == "zlib":
        return _zlib(level)
    if method == "zstd":
        return _zstd(level)
    return None


def _zlib(level: int) -> Compressor:
    stream = zlib.compressobj(level)

    def compress(pages: memoryview) -> bytes:
        return stream.compress(pages) + stream.flush(zlib.Z_SYNC_FLUSH)

    return compress


def _zstd(level: int) -> Compressor:
    from migrationd.pageops.zstandard import zstd  # late: most migrations do without

    stream = zstd.ZstdCompressor(level=level)

    def compress(pages: memoryview) -> bytes:
        return stream.compress(pages, mode=zstd.ZstdCompressor.FLUSH_BLOCK)

    return compress

"""Page data that was compressed as one endless stream, packet by packet.

A channel's stream begins with its first packet and never ends; each packet ends with a
flush, so that its pages are complete. What a packet may become is known before it is
decompressed.

Reference: stream format 3.4.
"""

import zlib
from collections.abc import Callable

Decompressor = Callable[[memoryview, int], bytes]
"""One packet and the size of its pages -> the pages; ValueError if it is anything else."""

ZSTD_WINDOW_LOG_LIMIT = 27
"""A stream that wants more memory than 128 MiB is refused; level 20 wants as much."""


def decompressor(method: str) -> Decompressor | None:
    """State of one channel; None for ``none``.

    Args:
        method: ``none``, ``zlib`` or ``zstd``.
    """
    if method == "zlib":
        return _zlib()
    if method == "zstd":
        return _zstd()
    return None


def _zlib() -> Decompressor:
    stream = zlib.decompressobj()

    def decompress(data: memoryview, size: int) -> bytes:
        try:
            # One byte more than may come, or the rest would hide in the stream's state.
            out = stream.decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        return _checked(out, size, ended=stream.eof)

    return decompress


def _zstd() -> Decompressor:
    from migrationd.pageops.zstandard import zstd  # late: most migrations do without

    stream = zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_LIMIT}
    )

    def decompress(data: memoryview, size: int) -> bytes:
        if stream.eof:
            raise ValueError("data behind the end of the stream")
        try:
            out = stream.decompress(data, size + 1)
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from None
        return _checked(out, size, ended=stream.eof)

    return decompress


def _checked(out: bytes, size: int, *, ended: bool) -> bytes:
    if len(out) != size:
        more = "more than " if len(out) > size else ""
        raise ValueError(f"{more}{min(len(out), size)} bytes where {size} were expected")
    if ended:
        raise ValueError("the stream ends")
    return out

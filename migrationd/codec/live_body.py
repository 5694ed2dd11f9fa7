"""Bodies of live sections that are kept as bytes but delimit themselves.

    dirty-bitmap: { flags  [cstr8 node]  [cstr8 bitmap]  START: be32 u8
                    BITS: be64 be32  unless ZEROES: be64 n, n bytes }*      until EOS
    block:        { be64 sector << 9 | flags  DEVICE_BLOCK: cstr8, 1 MiB unless ZERO }*  until EOS

They are measured instead of framed: a guest writes the disk contents in a ``block``
body, so it could write anything that looks like the end of a section, too.

Reference: stream format 7.1 and 7.2.
"""

from collections.abc import Callable

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.constants import (
    BLK_MIG_BLOCK_BYTES,
    BLK_MIG_FLAG_DEVICE_BLOCK,
    BLK_MIG_FLAG_EOS,
    BLK_MIG_FLAG_PROGRESS,
    BLK_MIG_FLAG_ZERO_BLOCK,
    DIRTY_BITMAP_MIG_EXTRA_FLAGS,
    DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME,
    DIRTY_BITMAP_MIG_FLAG_BITS,
    DIRTY_BITMAP_MIG_FLAG_COMPLETE,
    DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME,
    DIRTY_BITMAP_MIG_FLAG_EOS,
    DIRTY_BITMAP_MIG_FLAG_START,
    DIRTY_BITMAP_MIG_FLAG_ZEROES,
)
from migrationd.errors import StreamCorrupt

_BITMAP_CHUNK_LIMIT = 1 << 20
"""QEMU itself takes 10 KiB."""

_BITMAP_FLAGS = (
    DIRTY_BITMAP_MIG_FLAG_EOS
    | DIRTY_BITMAP_MIG_FLAG_ZEROES
    | DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME
    | DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME
    | DIRTY_BITMAP_MIG_FLAG_START
    | DIRTY_BITMAP_MIG_FLAG_COMPLETE
    | DIRTY_BITMAP_MIG_FLAG_BITS
)
_BLOCK_FLAGS = (
    BLK_MIG_FLAG_DEVICE_BLOCK | BLK_MIG_FLAG_EOS | BLK_MIG_FLAG_PROGRESS | BLK_MIG_FLAG_ZERO_BLOCK
)

Measure = Callable[[ReadBuffer, int], tuple[int, bool]]
"""Buffer and offset of a chunk -> offset behind it, and whether it was the last one."""


def measure_of(idstr: str, version_id: int) -> Measure | None:
    """The function that measures the chunks of a handler's bodies; None if none is known."""
    return _MEASURES.get((idstr, version_id))


def _dirty_bitmap_chunk(buffer: ReadBuffer, at: int) -> tuple[int, bool]:
    flags = buffer.uint(1, at)
    at += 1
    if flags & DIRTY_BITMAP_MIG_EXTRA_FLAGS:
        flags = flags << 8 | buffer.uint(1, at)
        at += 1
        if flags & DIRTY_BITMAP_MIG_EXTRA_FLAGS:
            flags = flags << 16 | buffer.uint(2, at)
            at += 2
        # Bits beyond the first byte have no meaning yet.
        raise _corrupt(buffer, "dirty-bitmap", f"unknown chunk flags {flags:#x}")
    if flags & ~_BITMAP_FLAGS:
        raise _corrupt(buffer, "dirty-bitmap", f"unknown chunk flags {flags:#x}")
    for name_flag in (DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME, DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME):
        if flags & name_flag:
            at += 1 + buffer.uint(1, at)
    if flags & DIRTY_BITMAP_MIG_FLAG_START:
        at += 5
    elif flags & DIRTY_BITMAP_MIG_FLAG_BITS:
        at += 12
        if not flags & DIRTY_BITMAP_MIG_FLAG_ZEROES:
            size = buffer.uint(8, at)
            if size > _BITMAP_CHUNK_LIMIT:
                raise _corrupt(buffer, "dirty-bitmap", f"a chunk of {size} bytes")
            at += 8 + size
    buffer.require(0, at)
    return at, bool(flags & DIRTY_BITMAP_MIG_FLAG_EOS)


def _block_chunk(buffer: ReadBuffer, at: int) -> tuple[int, bool]:
    flags = buffer.uint(8, at) & 0x1FF
    at += 8
    if flags & ~_BLOCK_FLAGS:
        raise _corrupt(buffer, "block", f"unknown record flags {flags:#x}")
    if flags & BLK_MIG_FLAG_DEVICE_BLOCK:
        at += 1 + buffer.uint(1, at)
        if not flags & BLK_MIG_FLAG_ZERO_BLOCK:
            at += BLK_MIG_BLOCK_BYTES
    buffer.require(0, at)
    return at, bool(flags & BLK_MIG_FLAG_EOS)


def _corrupt(buffer: ReadBuffer, section: str, message: str) -> StreamCorrupt:
    return StreamCorrupt(message, position=buffer.position, section=section)


_MEASURES: dict[tuple[str, int], Measure] = {
    ("dirty-bitmap", 1): _dirty_bitmap_chunk,
    ("block", 1): _block_chunk,
}

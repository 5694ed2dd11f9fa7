"""Bodies of ``dirty-bitmap`` sections: block dirty bitmaps, in chunks.

    chunk:  u8 flags  [cstr8 node]  [cstr8 bitmap]  then by flag
    START:  be32 granularity, u8 flags     BITS: be64 first sector, be32 sectors
    EOS:    nothing, the body's end              unless ZEROES: be64 n, n bytes

A name is left out while it stays the same, also from one section to the next.

Reference: stream format 7.1.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from migrationd.codec.constants import (
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

SECTION = "dirty-bitmap"
"""Name of the section."""

IS_ENABLED = 1
IS_PERSISTENT = 2
_BITMAP_FLAGS = 7
"""The third was once ``autoload``, and is ignored."""

SECTOR_BYTES = 512
CHUNK_LIMIT_BYTES = 10 << 10
"""Most bits of one chunk that QEMU takes."""

_SECTOR_LIMIT = 1 << 54
_LEAST_GRANULARITY = SECTOR_BYTES
_MOST_GRANULARITY = 1 << 31
_NAME_FLAGS = DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME | DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME


@dataclass(frozen=True, slots=True)
class Start:
    """A bitmap begins.

    Attributes:
        granularity: Bytes of disk per bit, a power of two.
        flags: ``IS_ENABLED``, ``IS_PERSISTENT``.
    """

    granularity: int
    flags: int


@dataclass(frozen=True, slots=True)
class Bits:
    """A stretch of a bitmap.

    Attributes:
        first_sector: Where it begins, in sectors of 512 bytes.
        sector_count: How long it is.
        data: One bit per granularity, least significant first, padded; None: all zero.
    """

    first_sector: int
    sector_count: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Complete:
    """A bitmap ends."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a chunk says of one bitmap, named in full."""

    node: str
    bitmap: str
    content: Start | Bits | Complete


class BitmapReader:
    """Reads the bodies of one stream in their order; knows which bitmaps are under way."""

    def __init__(self) -> None:
        self._node: str | None = None
        self._bitmap: str | None = None
        self._granularities: dict[tuple[str, str], int] = {}
        self._completed: set[tuple[str, str]] = set()

    def read(self, body: bytes) -> list[Chunk]:
        """Chunks of a body, which ends with EOS.

        Raises:
            StreamCorrupt: It is malformed, or speaks of a bitmap that is not under way.
        """
        chunks = []
        for chunk in self._chunks(body):
            self._check(chunk)
            chunks.append(chunk)
        return chunks

    def _chunks(self, body: bytes) -> Iterator[Chunk]:
        cursor = _Cursor(body)
        while True:
            flags = cursor.uint(1)
            if flags & DIRTY_BITMAP_MIG_EXTRA_FLAGS:
                raise _corrupt(f"unknown chunk flags {flags:#x}")
            if flags & DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME:
                self._node, self._bitmap = cursor.name(), None
            if flags & DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME:
                self._bitmap = cursor.name()
            kind = flags & ~_NAME_FLAGS
            if kind == DIRTY_BITMAP_MIG_FLAG_EOS:
                cursor.expect_end()
                return
            if self._node is None or self._bitmap is None:
                raise _corrupt(f"a chunk with flags {flags:#x} that names no bitmap")
            yield Chunk(self._node, self._bitmap, _content(kind, cursor))

    def _check(self, chunk: Chunk) -> None:
        key = (chunk.node, chunk.bitmap)
        content = chunk.content
        if isinstance(content, Start):
            if key in self._granularities:
                raise _corrupt(f"bitmap {_label(key)} begins twice")
            self._granularities[key] = content.granularity
            return
        granularity = self._granularities.get(key)
        if granularity is None or key in self._completed:
            raise _corrupt(f"bitmap {_label(key)} is not under way")
        if isinstance(content, Complete):
            self._completed.add(key)
        elif content.data is not None and 8 * len(content.data) < bit_count(content, granularity):
            raise _corrupt(
                f"bitmap {_label(key)}: {len(content.data)} bytes for {content.sector_count} "
                f"sectors at a granularity of {granularity}"
            )


class BitmapWriter:
    """Writes bodies for one stream, in their order."""

    def __init__(self) -> None:
        self._names: tuple[str, str] | None = None

    def write(self, chunks: Iterable[Chunk]) -> bytes:
        """A body of these chunks and EOS."""
        parts = [self._encode(chunk) for chunk in chunks]
        return b"".join(parts) + bytes([DIRTY_BITMAP_MIG_FLAG_EOS])

    def _encode(self, chunk: Chunk) -> bytes:
        flags, names = 0, b""
        last, self._names = self._names, (chunk.node, chunk.bitmap)
        if last is None or last[0] != chunk.node:
            flags |= DIRTY_BITMAP_MIG_FLAG_DEVICE_NAME
            names += _encode_name(chunk.node)
        if last != self._names:
            flags |= DIRTY_BITMAP_MIG_FLAG_BITMAP_NAME
            names += _encode_name(chunk.bitmap)
        match chunk.content:
            case Start(granularity, bitmap_flags):
                flags |= DIRTY_BITMAP_MIG_FLAG_START
                rest = granularity.to_bytes(4, "big") + bytes([bitmap_flags])
            case Complete():
                flags |= DIRTY_BITMAP_MIG_FLAG_COMPLETE
                rest = b""
            case Bits(first, count, data):
                flags |= DIRTY_BITMAP_MIG_FLAG_BITS
                rest = first.to_bytes(8, "big") + count.to_bytes(4, "big")
                if data is None:
                    flags |= DIRTY_BITMAP_MIG_FLAG_ZEROES
                else:
                    rest += len(data).to_bytes(8, "big") + data
        return bytes([flags]) + names + rest


def bit_count(bits: Bits, granularity: int) -> int:
    """How many bits a stretch has."""
    return -(-bits.sector_count * SECTOR_BYTES // granularity)


def dirty_count(bits: Bits, granularity: int) -> int:
    """How many of them are set."""
    if bits.data is None:
        return 0
    valid = (1 << bit_count(bits, granularity)) - 1
    return (int.from_bytes(bits.data, "little") & valid).bit_count()


def _content(kind: int, cursor: "_Cursor") -> Start | Bits | Complete:
    if kind == DIRTY_BITMAP_MIG_FLAG_START:
        granularity, flags = cursor.uint(4), cursor.uint(1)
        is_size = _LEAST_GRANULARITY <= granularity <= _MOST_GRANULARITY
        if not is_size or granularity & (granularity - 1) or flags & ~_BITMAP_FLAGS:
            raise _corrupt(f"a bitmap of granularity {granularity} with flags {flags:#x}")
        return Start(granularity, flags)
    if kind == DIRTY_BITMAP_MIG_FLAG_COMPLETE:
        return Complete()
    if kind & ~DIRTY_BITMAP_MIG_FLAG_ZEROES != DIRTY_BITMAP_MIG_FLAG_BITS:
        raise _corrupt(f"unknown chunk flags {kind:#x}")
    first, count = cursor.uint(8), cursor.uint(4)
    if first + count > _SECTOR_LIMIT:
        raise _corrupt(f"{count} sectors at sector {first}")
    if kind & DIRTY_BITMAP_MIG_FLAG_ZEROES:
        return Bits(first, count, None)
    size = cursor.uint(8)
    if size > CHUNK_LIMIT_BYTES:
        raise _corrupt(f"a chunk of {size} bytes")
    return Bits(first, count, cursor.take(size))


class _Cursor:
    """Reads a body that is there as a whole."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._body):
            raise _corrupt("the section ends inside a chunk")
        data = self._body[self._at : end]
        self._at = end
        return data

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        raw = self.take(self.uint(1))
        if not raw or b"\0" in raw:
            raise _corrupt(f"the name {raw!r}")
        return raw.decode("utf-8", "surrogateescape")

    def expect_end(self) -> None:
        if self._at != len(self._body):
            raise _corrupt(f"{len(self._body) - self._at} bytes behind the last chunk")


def _encode_name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    return bytes([len(raw)]) + raw


def _label(key: tuple[str, str]) -> str:
    return f"{key[1]!r} of node {key[0]!r}"


def _corrupt(message: str) -> StreamCorrupt:
    return StreamCorrupt(message, section=SECTION)

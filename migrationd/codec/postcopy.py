"""Commands of postcopy and of its recovery, and the received-page bitmap.

    ADVISE        be64 page sizes of all blocks, or-ed   be64 target page size
    RAM_DISCARD   u8 0  cstr8 block  u8 0  { be64 start  be64 length }*
    PACKAGED      be32 n, then n bytes behind the command
    RECV_BITMAP   cstr8 block
    bitmap        bit i = byte i/8, bit i%8; a multiple of 8 bytes

Reference: stream format 4.3-4.6 and 5.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.codec.command import encode_command
from migrationd.codec.constants import (
    MIG_CMD_PACKAGED,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_POSTCOPY_LISTEN,
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    MIG_CMD_POSTCOPY_RESUME,
    MIG_CMD_POSTCOPY_RUN,
    MIG_CMD_RECV_BITMAP,
)
from migrationd.codec.header import encode_cstr8
from migrationd.codec.records import Command
from migrationd.errors import StreamCorrupt

PING_PACKAGE_LOADED = 0x42
"""Value of the PING whose answer says that the package is loaded."""

DISCARD_RANGES_MAX = 12
"""Ranges of one command; QEMU sends no more."""

DISCARD_RANGES_MANY = 2048
"""The same between two of us."""

_DISCARD_VERSION = 0
_BITMAP_WORD_BYTES = 8

Ranges = npt.NDArray[np.int64]
"""Runs of pages, shape ``(n, 2)``: first page, count."""


@dataclass(frozen=True, slots=True)
class Advise:
    """Payload of ADVISE.

    Attributes:
        page_sizes: Backing page sizes of all blocks, or-ed, in bytes.
        target_page_size: Bytes.
    """

    page_sizes: int
    target_page_size: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Payload of RAM_DISCARD.

    Attributes:
        idstr: RAM block.
        ranges: Start and length in bytes, shape ``(n, 2)``, uint64.
    """

    idstr: str
    ranges: npt.NDArray[np.uint64]


def encode_ping(value: int) -> bytes:
    """PING with its type byte."""
    return encode_command(Command(MIG_CMD_PING, value.to_bytes(4, "big")))


def encode_advise(page_sizes: Sequence[int], target_page_size: int) -> bytes:
    """ADVISE for blocks that are backed by pages of these sizes."""
    summary = 0
    for size in page_sizes:
        summary |= size
    payload = summary.to_bytes(8, "big") + target_page_size.to_bytes(8, "big")
    return encode_command(Command(MIG_CMD_POSTCOPY_ADVISE, payload))


def decode_advise(payload: bytes) -> Advise | None:
    """ADVISE; None if it announces dirty bitmaps only.

    Raises:
        StreamCorrupt: It is of no length that there is, or a size is none.
    """
    if not payload:
        return None
    if len(payload) != 16:
        raise StreamCorrupt(f"ADVISE of {len(payload)} bytes", section="postcopy")
    advise = Advise(int.from_bytes(payload[:8], "big"), int.from_bytes(payload[8:], "big"))
    size = advise.target_page_size
    if not size or size & (size - 1) or not advise.page_sizes:
        raise StreamCorrupt(
            f"ADVISE of target pages of {size} bytes and pages of {advise.page_sizes:#x}",
            section="postcopy",
        )
    return advise


def encode_discards(
    idstr: str, ranges: Ranges, page_size: int, most: int = DISCARD_RANGES_MAX
) -> bytes:
    """As many RAM_DISCARD commands as the ranges need; none for no range.

    Args:
        idstr: RAM block.
        ranges: First page and count of each, shape ``(n, 2)``.
        page_size: Target page size in bytes.
        most: Ranges of one command.
    """
    head = bytes([_DISCARD_VERSION]) + encode_cstr8(idstr) + b"\0"
    wire = (ranges * page_size).astype(">u8")
    return b"".join(
        encode_command(
            Command(
                MIG_CMD_POSTCOPY_RAM_DISCARD,
                head + wire[start : start + most].tobytes(),
            )
        )
        for start in range(0, len(wire), most)
    )


def decode_discard(payload: bytes) -> Discard:
    """RAM_DISCARD.

    Raises:
        StreamCorrupt: The payload is malformed.
    """
    length = payload[1] if len(payload) > 1 else 0
    rest = payload[3 + length :]
    if (
        len(payload) < 3 + length
        or payload[0] != _DISCARD_VERSION
        or not length
        or payload[2 + length]
        or not rest
        or len(rest) % 16
    ):
        raise StreamCorrupt(f"RAM_DISCARD of {len(payload)} bytes", section="postcopy")
    ranges = np.frombuffer(rest, ">u8").astype(np.uint64).reshape(-1, 2)
    return Discard(payload[2 : 2 + length].decode("latin-1"), ranges)


def encode_listen() -> bytes:
    """LISTEN."""
    return encode_command(Command(MIG_CMD_POSTCOPY_LISTEN, b""))


def encode_run() -> bytes:
    """RUN."""
    return encode_command(Command(MIG_CMD_POSTCOPY_RUN, b""))


def encode_packaged(package: bytes) -> bytes:
    """PACKAGED with the package behind it."""
    return encode_command(Command(MIG_CMD_PACKAGED, len(package).to_bytes(4, "big"))) + package


def encode_recv_bitmap(idstr: str) -> bytes:
    """The source's question for a block's received pages."""
    return encode_command(Command(MIG_CMD_RECV_BITMAP, encode_cstr8(idstr)))


def decode_recv_bitmap(payload: bytes) -> str:
    """Block that the source asks for.

    Raises:
        StreamCorrupt: The payload is malformed.
    """
    if len(payload) < 2 or payload[0] != len(payload) - 1:
        raise StreamCorrupt(f"RECV_BITMAP of {len(payload)} bytes", section="postcopy")
    return payload[1:].decode("latin-1")


def encode_resume() -> bytes:
    """RESUME."""
    return encode_command(Command(MIG_CMD_POSTCOPY_RESUME, b""))


def bitmap_bytes(page_count: int) -> int:
    """Size of a block's received-page bitmap."""
    return -(-page_count // (8 * _BITMAP_WORD_BYTES)) * _BITMAP_WORD_BYTES


def pack_received(received: npt.NDArray[np.bool_]) -> bytes:
    """Received-page bitmap of one bool per page."""
    return (
        np.packbits(received, bitorder="little").tobytes().ljust(bitmap_bytes(len(received)), b"\0")
    )


def unpack_received(idstr: str, bitmap: bytes, page_count: int) -> npt.NDArray[np.bool_]:
    """One bool per page of a received-page bitmap.

    Raises:
        StreamCorrupt: It is not of the block's size.
    """
    if len(bitmap) != bitmap_bytes(page_count):
        raise StreamCorrupt(
            f"received-page bitmap of {len(bitmap)} bytes for {page_count} pages",
            section="return path",
            block=idstr,
        )
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little").view(np.bool_)
    return bits[:page_count]

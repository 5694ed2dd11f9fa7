"""QEMU's mapped-ram migration file: a fixed place for each page.

    header, CONFIGURATION (its capabilities name mapped-ram), early device sections
    START ram: MEM_SIZE word, and for each block
        cstr8 idstr  be64 used_length
        be32 version 1  be64 page_size  be64 bitmap_position  be64 pages_position
        bitmap      bit i of the little-endian words = page i is in the pages area
        hole to the next MiB
        pages area  used_length bytes; the stream continues behind it
    EOS, footer; END ram: EOS, footer; device sections; EOF; VMDESCRIPTION

Reference: stream format 8.3. QEMU 9.0 and later load such a file with ``file:`` and
the capability ``mapped-ram``; the reader is ``store/mapped_ram_reader.py``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from migrationd.codec.constants import (
    MAPPED_RAM_FILE_OFFSET_ALIGNMENT,
    MAPPED_RAM_HDR_VERSION,
    MIG_CMD_SWITCHOVER_START,
    QEMU_VM_FILE_VERSION,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SECTION_VERSION,
)
from migrationd.codec.encode import StreamEncoder, encode_opaque_section, encode_vmdescription
from migrationd.codec.header import encode_cstr8
from migrationd.codec.ram_encode import encode_eos
from migrationd.codec.records import (
    Command,
    Configuration,
    EndOfStream,
    FileHeader,
    OpaqueSection,
)
from migrationd.codec.section import encode_section_footer, encode_section_header

CAPABILITY = "mapped-ram"
RAM_SECTION_ID = (1 << 20) - 1
"""Far from any number that a device came with."""

MAP_HEADER_BYTES = 28


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A RAM block and its places in the file, in bytes."""

    idstr: str
    used_length: int
    page_size: int
    bitmap_position: int
    pages_position: int

    @property
    def page_count(self) -> int:
        """Target pages."""
        return self.used_length // self.page_size

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the bitmap, whole 64-bit words."""
        return bitmap_bytes(self.page_count)

    @property
    def end_position(self) -> int:
        """Where the stream continues behind the pages area."""
        return self.pages_position + self.used_length


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything before the last bytes of a file goes.

    Attributes:
        pieces: Positions and bytes: head, block entries, EOS of START.
        blocks: RAM blocks in order.
        tail_position: Where what follows the START section of RAM begins.
        configuration: What the file begins with.
    """

    pieces: tuple[tuple[int, bytes], ...]
    blocks: tuple[PlacedBlock, ...]
    tail_position: int
    configuration: Configuration


def bitmap_bytes(page_count: int) -> int:
    """Bytes of a bitmap of so many pages, whole 64-bit words."""
    return -(-page_count // 64) * 8


def plan_layout(
    configuration: Configuration,
    early: Sequence[OpaqueSection],
    blocks: Sequence[tuple[str, int]],
    page_size: int,
    *,
    position: int = 0,
) -> Layout:
    """Compute where everything goes.

    Args:
        configuration: Of the guest; the capabilities are set to mapped-ram.
        early: Sections that precede RAM.
        blocks: idstr and used length in bytes of each block, in order.
        page_size: Target page size in bytes.
        position: Where the stream begins in the file; all positions count from the file's start.
    """
    encode = StreamEncoder(page_size).encode
    named = Configuration(
        configuration.machine, configuration.target_page_bits, (CAPABILITY,), configuration.uuid
    )
    piece = encode(FileHeader(QEMU_VM_FILE_VERSION)) + encode(named)
    piece += b"".join(map(encode_opaque_section, early))
    piece += encode_section_header(
        QEMU_VM_SECTION_START, RAM_SECTION_ID, "ram", 0, RAM_SECTION_VERSION
    )
    piece += (sum(length for _, length in blocks) | RAM_SAVE_FLAG_MEM_SIZE).to_bytes(8, "big")
    pieces: list[tuple[int, bytes]] = []
    placed: list[PlacedBlock] = []
    for idstr, length in blocks:
        piece += encode_cstr8(idstr) + length.to_bytes(8, "big")
        bitmap_position = position + len(piece) + MAP_HEADER_BYTES
        unit = MAPPED_RAM_FILE_OFFSET_ALIGNMENT
        bitmap_end = bitmap_position + bitmap_bytes(length // page_size)
        block = PlacedBlock(
            idstr, length, page_size, bitmap_position, -(-bitmap_end // unit) * unit
        )
        pieces.append((position, piece + _map_header(block)))
        placed.append(block)
        position = block.end_position
        piece = b""
    piece += encode_eos() + encode_section_footer(RAM_SECTION_ID)
    pieces.append((position, piece))
    return Layout(tuple(pieces), tuple(placed), position + len(piece), named)


def encode_tail(
    setup: Sequence[OpaqueSection],
    late: Sequence[OpaqueSection],
    vmdescription: bytes,
    *,
    switchover_start: bool,
) -> bytes:
    """Everything behind the START section of RAM.

    Args:
        setup: Sections of the setup phase that follow it.
        late: What came after the setup phase, in order.
        vmdescription: JSON.
        switchover_start: Whether the machine type sends SWITCHOVER_START.
    """
    encode = StreamEncoder().encode
    parts = list(takewhile(lambda section: section.kind == QEMU_VM_SECTION_PART, late))
    tail = [*map(encode_opaque_section, setup), *map(encode_opaque_section, parts)]
    if switchover_start:
        tail.append(encode(Command(MIG_CMD_SWITCHOVER_START, b"")))
    tail.append(encode_section_header(QEMU_VM_SECTION_END, RAM_SECTION_ID))
    tail.append(encode_eos() + encode_section_footer(RAM_SECTION_ID))
    tail += map(encode_opaque_section, late[len(parts) :])
    tail += [encode(EndOfStream()), encode_vmdescription(vmdescription)]
    return b"".join(tail)


def write_bitmap(fd: int, block: PlacedBlock, present: npt.NDArray[np.bool_]) -> None:
    """Write one block's bitmap.

    Args:
        fd: File.
        block: The block.
        present: One bool per page, shape ``(page count,)``.

    Raises:
        OSError: As ``pwrite``.
    """
    raw = np.zeros(block.bitmap_bytes, np.uint8)
    packed = np.packbits(present, bitorder="little")
    raw[: len(packed)] = packed
    write_at(fd, raw.data, block.bitmap_position)


def write_at(fd: int, data: bytes | memoryview, position: int) -> None:
    """``pwrite`` everything.

    Raises:
        OSError: As the call.
    """
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, position)
        view = view[done:]
        position += done


def _map_header(block: PlacedBlock) -> bytes:
    numbers = (block.page_size, block.bitmap_position, block.pages_position)
    return MAPPED_RAM_HDR_VERSION.to_bytes(4, "big") + b"".join(
        number.to_bytes(8, "big") for number in numbers
    )

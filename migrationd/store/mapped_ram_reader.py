"""Reading a mapped-ram file, whoever wrote it.

The file is checked as a peer's stream is: each length and place is compared with what is
there before it is used. Pages stay where they are; the caller maps them.

Everything that is not a page is decoded by the stream decoder, from a plain stream that is
put together of the file's parts: what is between the parts are pages and bitmaps.

Reference: stream format 8.3; the layout is drawn in ``store/mapped_ram.py``.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.constants import (
    MAPPED_RAM_HDR_VERSION,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_SWITCHOVER_START,
    QEMU_VM_FILE_VERSION,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
    RAM_SAVE_FLAG_MEM_SIZE,
)
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.header import decode_configuration, decode_file_header
from migrationd.codec.ram_encode import encode_block_list
from migrationd.codec.records import (
    Command,
    Configuration,
    EndOfStream,
    FileHeader,
    OpaqueSection,
    RamBlockEntry,
    RamBlockList,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    VmDescription,
)
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import StoreError, StreamError
from migrationd.store.mapped_ram import CAPABILITY, MAP_HEADER_BYTES, PlacedBlock

BLOCK_LIMIT = 4096

RAM_LIMIT_BYTES = 16 << 40
"""Largest guest where nothing else is said. A file of holes can claim any size for nothing, and
its bitmaps would have to be read."""

_CHUNK_BYTES = 256 << 10
_HEAD_BYTES = 64 << 10
"""More than a configuration can have: a name, 64 capabilities, a UUID."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds, besides pages.

    Attributes:
        configuration: Machine type and what goes with it.
        blocks: RAM blocks in order.
        early: Sections of the setup phase.
        late: Sections after it.
        vmdescription: JSON, or None.
        has_switchover_start: The stream contained SWITCHOVER_START.
        metadata_crc32: Sum of everything but pages: what is not a pages area or a hole.
    """

    configuration: Configuration
    blocks: tuple[PlacedBlock, ...]
    early: tuple[OpaqueSection, ...]
    late: tuple[OpaqueSection, ...]
    vmdescription: bytes | None
    has_switchover_start: bool
    metadata_crc32: int


def read_contents(
    fd: int, path: str, *, position: int = 0, ram_limit_bytes: int | None = None
) -> Contents:
    """Read a file; of its pages areas only the places are looked at.

    Args:
        fd: File.
        path: Its name, for messages.
        position: Where the stream begins in it (``file:PATH,offset=N``).
        ram_limit_bytes: Largest guest that is taken; ``RAM_LIMIT_BYTES`` by default.

    Raises:
        StoreError: It is not a complete mapped-ram file, its places are out of bounds, or it
            exceeds the limits.
    """
    try:
        return _Reader(fd, path, position, ram_limit_bytes).read()
    except NeedData:
        raise StoreError(f"'{path}': the file ends too early") from None
    except StreamError as error:
        raise StoreError(f"'{path}': {error}") from error
    except OSError as error:
        raise StoreError(f"'{path}': {error.strerror}") from error


def read_packed_bitmap(fd: int, block: PlacedBlock) -> npt.NDArray[np.uint8]:
    """One bit per page, lowest first: the pages area holds it.

    Returns:
        Whole bytes, shape ``(n,)``; bits behind the last page are 0, whatever the file says.

    Raises:
        StoreError: The file ends inside the bitmap, or cannot be read.
    """
    length, rest = -(-block.page_count // 8), block.page_count % 8
    bitmap = np.empty(length, np.uint8)
    at = 0
    try:
        for piece in _read(fd, block.bitmap_position, length):
            bitmap[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    except NeedData:
        raise StoreError(f"the file ends inside the bitmap of '{block.idstr}'") from None
    except OSError as error:
        raise StoreError(f"the bitmap of '{block.idstr}': {error.strerror}") from error
    if rest:
        bitmap[-1] &= (1 << rest) - 1
    return bitmap


def read_bitmap(fd: int, block: PlacedBlock) -> npt.NDArray[np.bool_]:
    """One bool per page: the pages area holds it.

    Raises:
        StoreError: The file ends inside the bitmap, or cannot be read.
    """
    bitmap = read_packed_bitmap(fd, block)
    return np.unpackbits(bitmap, count=block.page_count, bitorder="little").view(np.bool_)


class _Reader:
    def __init__(self, fd: int, path: str, position: int, ram_limit_bytes: int | None) -> None:
        self._fd = fd
        self._path = path
        self._start = position
        self._ram_limit_bytes = RAM_LIMIT_BYTES if ram_limit_bytes is None else ram_limit_bytes
        self._size = os.fstat(fd).st_size
        self._limits = StreamLimits(ram_blocks=BLOCK_LIMIT)
        self._crc32 = 0

    def read(self) -> Contents:
        configuration, after_configuration = self._read_configuration()
        plain = Configuration(configuration.machine, configuration.target_page_bits)
        page_size = 1 << (configuration.target_page_bits or 12)
        encode = StreamEncoder(page_size).encode
        head = encode(FileHeader(QEMU_VM_FILE_VERSION)) + encode(plain)
        list_position = self._find_block_list(head, after_configuration)
        blocks, entry_ranges = self._read_blocks(list_position, page_size)
        for begin, end in ((self._start, list_position), *entry_ranges):
            self._add_to_sum(begin, end)

        decoder = StreamDecoder(self._limits)
        decoder.feed(head)
        for piece in _read(self._fd, after_configuration, list_position - after_configuration):
            decoder.feed(piece)
        entries = tuple(RamBlockEntry(block.idstr, block.used_length) for block in blocks)
        decoder.feed(encode_block_list(entries))
        tail_position = blocks[-1].end_position if blocks else list_position + 8
        fed = len(head) + list_position - after_configuration + len(encode_block_list(entries))
        try:
            return self._decode(decoder, tail_position, configuration, blocks)
        except StreamError as error:
            # Of the put-together stream; the user has the file.
            if error.position is not None:
                error.position += (
                    tail_position - fed
                    if error.position >= fed
                    else after_configuration - len(head)
                )
            raise

    def _read_configuration(self) -> tuple[Configuration, int]:
        data = os.pread(self._fd, _HEAD_BYTES, self._start)
        buffer = ReadBuffer(len(data) + 1, len(data) + 1)
        buffer.feed(data)
        decode_file_header(buffer)
        if not buffer.peek(1) == b"\x07":
            raise StoreError(f"'{self._path}' has no configuration: its form is not known")
        configuration = decode_configuration(buffer)
        capabilities = configuration.capabilities or ()
        if CAPABILITY not in capabilities:
            raise StoreError(f"'{self._path}' is a plain migration stream, not a mapped-ram file")
        if others := [name for name in capabilities if name != CAPABILITY]:
            raise StoreError(f"'{self._path}': capability {others[0]} is not taken")
        return configuration, self._start + buffer.position

    def _find_block_list(self, head: bytes, position: int) -> int:
        """File position of the MEM_SIZE word, behind the sections that precede RAM."""
        decoder = StreamDecoder(self._limits)
        decoder.feed(head)
        ahead = position - len(head)
        try:
            for record in self._records(decoder, position):
                if isinstance(record, SectionHeader):
                    if record.kind != QEMU_VM_SECTION_START:
                        break
                    return decoder.position + ahead
                if not isinstance(record, FileHeader | Configuration | OpaqueSection | Command):
                    break
        except StreamError as error:
            if error.position is not None:
                error.position += ahead
            raise
        raise StoreError(f"'{self._path}' has no RAM section")

    def _read_blocks(
        self, position: int, page_size: int
    ) -> tuple[tuple[PlacedBlock, ...], list[tuple[int, int]]]:
        """Blocks, and the ranges of the file that their entries and bitmaps are in."""
        word = int.from_bytes(self._pread(position, 8), "big")
        if word & (page_size - 1) != RAM_SAVE_FLAG_MEM_SIZE:
            raise StoreError(f"'{self._path}': no RAM block list at {position}")
        missing = word & ~(page_size - 1)
        if missing > self._ram_limit_bytes:
            raise StoreError(
                f"'{self._path}': the guest has {missing} bytes of RAM, the limit is "
                f"{self._ram_limit_bytes}; raise -ram-limit"
            )
        ranges = [(position, position + 8)]
        position += 8
        blocks: list[PlacedBlock] = []
        while missing:
            block, header_end = self._read_block(position, page_size)
            missing -= block.used_length
            if missing < 0 or len(blocks) == BLOCK_LIMIT:
                raise StoreError(f"'{self._path}': the RAM block list does not add up")
            ranges.append((position, header_end))
            ranges.append((block.bitmap_position, block.bitmap_position + block.bitmap_bytes))
            blocks.append(block)
            position = block.end_position
        return tuple(blocks), ranges

    def _read_block(self, position: int, page_size: int) -> tuple[PlacedBlock, int]:
        name_length = self._pread(position, 1)[0]
        raw = self._pread(position + 1, name_length + 8 + MAP_HEADER_BYTES)
        idstr = raw[:name_length].decode("latin-1")
        numbers = raw[name_length:]
        version = int.from_bytes(numbers[8:12], "big")
        block = PlacedBlock(
            idstr,
            int.from_bytes(numbers[:8], "big"),
            int.from_bytes(numbers[12:20], "big"),
            int.from_bytes(numbers[20:28], "big"),
            int.from_bytes(numbers[28:36], "big"),
        )
        header_end = position + 1 + len(raw)
        if version > MAPPED_RAM_HDR_VERSION or block.page_size != page_size:
            raise StoreError(
                f"'{self._path}': block '{idstr}' has mapped-ram header version {version} and "
                f"pages of {block.page_size} bytes, known are version {MAPPED_RAM_HDR_VERSION} "
                f"and pages of {page_size}"
            )
        if (
            not block.used_length
            or block.used_length % page_size
            or block.bitmap_position < header_end
            or block.pages_position < block.bitmap_position + block.bitmap_bytes
            or block.pages_position % page_size
            or block.end_position > self._size
        ):
            raise StoreError(
                f"'{self._path}': block '{idstr}' lies outside the file of {self._size} bytes or "
                f"over something else: bitmap at {block.bitmap_position:#x}, "
                f"{block.used_length:#x} bytes of pages at {block.pages_position:#x}"
            )
        return block, header_end

    def _decode(
        self,
        decoder: StreamDecoder,
        position: int,
        configuration: Configuration,
        blocks: tuple[PlacedBlock, ...],
    ) -> Contents:
        early: list[OpaqueSection] = []
        late: list[OpaqueSection] = []
        sections = early
        description: bytes | None = None
        has_switchover_start = False
        for record in self._records(decoder, position, into_sum=True):
            match record:
                case SectionHeader(kind) if kind != QEMU_VM_SECTION_START:
                    sections = late
                case OpaqueSection(kind):
                    if kind in (QEMU_VM_SECTION_PART, QEMU_VM_SECTION_END):
                        sections = late
                    sections.append(record)
                case VmDescription(json):
                    description = json
                case Command(number) if number == MIG_CMD_SWITCHOVER_START:
                    has_switchover_start = True
                    sections = late
                case Command(number, b"") if number == MIG_CMD_POSTCOPY_ADVISE:
                    pass  # dirty bitmaps may come
                case (
                    FileHeader()
                    | Configuration()
                    | SectionHeader()
                    | SectionFooter()
                    | RamBlockList()
                    | RamEos()
                    | EndOfStream()
                ):
                    pass
                case _:
                    raise StoreError(
                        f"'{self._path}': {type(record).__name__} in a mapped-ram file"
                    )
        return Contents(
            configuration,
            blocks,
            tuple(early),
            tuple(late),
            description,
            has_switchover_start,
            self._crc32,
        )

    def _records(
        self, decoder: StreamDecoder, position: int, *, into_sum: bool = False
    ) -> Iterator[Record]:
        """Records of a decoder that is fed from here on until it is finished."""
        while not decoder.finished:
            record = decoder.next_record()
            if record is not None:
                yield record
            elif not decoder.finished:
                data = os.pread(self._fd, _CHUNK_BYTES, position)
                position += len(data)
                if into_sum:
                    self._crc32 = zlib.crc32(data, self._crc32)
                if data:
                    decoder.feed(data)
                else:
                    decoder.feed_eof()

    def _add_to_sum(self, begin: int, end: int) -> None:
        for piece in _read(self._fd, begin, end - begin):
            self._crc32 = zlib.crc32(piece, self._crc32)

    def _pread(self, position: int, count: int) -> bytes:
        return b"".join(_read(self._fd, position, count))


def _read(fd: int, position: int, count: int) -> Iterator[bytes]:
    """Bytes of a file, in pieces of bounded size.

    Raises:
        NeedData: The file ends before.
        OSError: As ``pread``.
    """
    end = position + count
    while position < end:
        data = os.pread(fd, min(end - position, 1 << 20), position)
        if not data:
            raise NeedData
        yield data
        position += len(data)

"""The body of the ``ram`` section: block list and page records.

    be64 word = address | flags      flags in the low bits, address a page offset
    [cstr8 block idstr]              only without CONTINUE
    payload                          PAGE: one target page; ZERO: the fill byte; ...

A PAGE|CONTINUE record has a fixed length whatever its address is, and so has
ZERO|CONTINUE: a row of equal records is found and checked as one array. Where
kinds alternate a plain loop is faster (a NumPy call costs some microseconds), so
a probe some records ahead chooses.

Reference: stream format 2.
"""

import struct
import numpy as np

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.constants import (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_HOOK,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SAVE_FLAG_MULTIFD_FLUSH,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
)
from migrationd.codec.records import (
    CompressedPage,
    MappedRamHeader,
    MixedBatch,
    MultifdFlush,
    PageBatch,
    RamBlockEntry,
    RamBlockList,
    RamEos,
    RamRecord,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.errors import StreamCorrupt, StreamLimit, StreamUnsupported

PROBE_RECORDS = 12
"""A row at least this long is worth a NumPy pass."""

FIRST_RECORDS = 256
"""A row is looked at this far first, and as a whole only if it goes on."""

LOOP_RECORDS = 256
"""Most records that one pass of the plain loop collects."""

_WORD = struct.Struct(">Q")
_PAGE_CONTINUE = RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE
_ZERO_CONTINUE = RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE
_KINDS = (
    RAM_SAVE_FLAG_ZERO
    | RAM_SAVE_FLAG_PAGE
    | RAM_SAVE_FLAG_XBZRLE
    | RAM_SAVE_FLAG_COMPRESS_PAGE
)


class RamDecoder:
    """Decodes bodies of one ``ram`` section; the CONTINUE state lives across bodies.

    Args:
        page_size: Target page size in bytes.
        ram_limit_bytes: Largest sum of block lengths, or None.
        block_limit: Most blocks.
        has_addresses: Block entries carry a guest-physical address (``x-ignore-shared``).
        has_mapped_ram: Block entries carry a mapped-ram header.
    """

    def __init__(
        self,
        page_size: int,
        *,
        ram_limit_bytes: int | None,
        block_limit: int,
        has_addresses: bool = False,
        has_mapped_ram: bool = False,
    ) -> None:
        self.page_size = page_size
        self.blocks: tuple[RamBlockEntry, ...] = ()
        self._ram_limit_bytes = ram_limit_bytes
        self._block_limit = block_limit
        self._has_addresses = has_addresses
        self._has_mapped_ram = has_mapped_ram
        self._index: dict[bytes, int] = {}
        self._last_block: int | None = None
        self._limits: list[int] = []

    def decode(self, buffer: ReadBuffer) -> RamRecord:
        """Decode what is at the cursor: one record, or a row of page records.

        Raises:
            NeedData: The record at the cursor is not complete.
            StreamCorrupt: The bytes contradict the format or the block list.
            StreamLimit: The block list asks for more than the limits.
            StreamUnsupported: A record that this program does not take.
        """
        word = buffer.uint(8)
        mask = self.page_size - 1
        flags = word & mask
        if flags == _PAGE_CONTINUE or flags == _ZERO_CONTINUE:
            return self._decode_row(buffer, flags)
        return self._decode_one(buffer, word & ~mask, flags)

    def _decode_row(self, buffer: ReadBuffer, flags: int) -> RamRecord:
        block = self._last_block
        if block is None:
            raise self._corrupt(buffer, "CONTINUE before any block was named")
        stride = 8 + self.page_size if flags == _PAGE_CONTINUE else 9
        probe = buffer.start + PROBE_RECORDS * stride
        if probe + stride <= buffer.end:
            ahead = _WORD.unpack_from(buffer.data, probe)[0]
            if ahead & (self.page_size - 1) == flags:
                available = (buffer.end - buffer.start) // stride
                found = self._row_as_array(buffer, block, flags, min(available, FIRST_RECORDS))
                if found is not None and found[1] == FIRST_RECORDS < available:
                    found = self._row_as_array(buffer, block, flags, available)
                if found is not None:
                    buffer.skip(found[1] * stride)
                    return found[0]
        return self._row_in_loop(buffer, block)

    def _row_as_array(
        self, buffer: ReadBuffer, block: int, flags: int, available: int
    ) -> tuple[RamRecord, int] | None:
        """The equal ones of the next records as one batch; the cursor stays.

        Returns:
            The batch and its number of records; None if the row is too short for an array.
        """
        stride = 8 + self.page_size if flags == _PAGE_CONTINUE else 9
        raw = np.frombuffer(buffer.data, np.uint8, available * stride, buffer.start)
        rows = raw.reshape(available, stride)
        words = np.ascontiguousarray(rows[:, :8]).view(">u8").reshape(available).astype(np.int64)
        other = np.flatnonzero((words & (self.page_size - 1)) != flags)
        count = int(other[0]) if len(other) else available
        if count < PROBE_RECORDS // 2:
            return None
        words = words[:count]
        # An address of 2^63 or more is negative here.
        if int(words.min()) < 0 or int(words.max()) >= self._limits[block]:
            raise self._outside(buffer, block, int(words.max()))
        pages = words // self.page_size
        if flags == _PAGE_CONTINUE:
            first = int(pages[0])
            is_run = int(pages[-1]) - first == count - 1 and bool((np.diff(pages) == 1).all())
            return PageBatch(block, pages, rows[:count, 8:], is_run, True), count
        fills = rows[:count, 8]
        fill = int(fills[0])
        if fill or fills.any():
            different = np.flatnonzero(fills != fill)
            if len(different):
                count = int(different[0])
        return ZeroBatch(block, pages[:count], fill, True), count

    def _row_in_loop(self, buffer: ReadBuffer, block: int) -> RamRecord:
        """Short rows of mixed kinds, collected record by record."""
        page_size = self.page_size
        mask = page_size - 1
        limit = self._limits[block]
        data = buffer.data
        at = buffer.start
        end = buffer.end
        unpack = _WORD.unpack_from
        pages: list[int] = []
        content_at: list[int] = []
        for _ in range(LOOP_RECORDS):
            if at + 9 > end:
                break
            word = unpack(data, at)[0]
            flags = word & mask
            if flags == _PAGE_CONTINUE:
                if at + 8 + page_size > end:
                    break
                content_at.append(at + 8)
                at += 8 + page_size
            elif flags == _ZERO_CONTINUE and not data[at + 8]:
                content_at.append(-1)
                at += 9
            else:
                break
            if word >= limit:
                raise self._outside(buffer, block, word)
            pages.append(word // page_size)
        if not pages:
            return self._continued_zero(buffer, block)
        buffer.skip(at - buffer.start)
        return MixedBatch(block, pages, content_at, data)

    def _continued_zero(self, buffer: ReadBuffer, block: int) -> RamRecord:
        """A single ZERO|CONTINUE with a fill byte other than 0, or nothing complete yet."""
        word = buffer.uint(8)
        if word & (self.page_size - 1) != _ZERO_CONTINUE:
            raise NeedData
        fill = buffer.uint(1, 8)
        page = self._page(buffer, block, word)
        buffer.skip(9)
        return ZeroBatch(block, np.array([page], np.int64), fill, True)

    def _decode_one(self, buffer: ReadBuffer, address: int, flags: int) -> RamRecord:
        if flags == RAM_SAVE_FLAG_EOS:
            buffer.skip(8)
            return RamEos()
        if flags == RAM_SAVE_FLAG_MEM_SIZE:
            return self._decode_block_list(buffer, address)
        if flags == RAM_SAVE_FLAG_MULTIFD_FLUSH:
            buffer.skip(8)
            return MultifdFlush()
        if flags == RAM_SAVE_FLAG_HOOK:
            raise StreamUnsupported(
                "an RDMA record", position=buffer.position, section="ram", hint="use tcp: or unix:"
            )
        kind = flags & ~RAM_SAVE_FLAG_CONTINUE
        if kind & ~_KINDS or kind.bit_count() != 1:
            raise self._corrupt(buffer, f"RAM record with flags {flags:#x}")
        continued = bool(flags & RAM_SAVE_FLAG_CONTINUE)
        block, size = self._named_block(buffer, continued)
        page = self._page(buffer, block, address)
        record: RamRecord
        numbers = np.array([page], np.int64)
        if kind == RAM_SAVE_FLAG_PAGE:
            at = buffer.require(self.page_size, size)
            content = np.frombuffer(buffer.data, np.uint8, self.page_size, at)
            record = PageBatch(block, numbers, content.reshape(1, -1), True, continued)
            size += self.page_size
        elif kind == RAM_SAVE_FLAG_ZERO:
            record = ZeroBatch(block, numbers, buffer.uint(1, size), continued)
            size += 1
        elif kind == RAM_SAVE_FLAG_XBZRLE:
            if buffer.uint(1, size) != ENCODING_FLAG_XBZRLE:
                raise self._corrupt(buffer, "XBZRLE page with an unknown encoding")
            length = buffer.uint(2, size + 1)
            if not 0 < length <= self.page_size:
                raise self._corrupt(buffer, f"XBZRLE page of {length} bytes")
            record = XbzrlePage(block, page, buffer.peek(length, size + 3), continued)
            size += 3 + length
        else:
            length = buffer.uint(4, size)
            if not 0 < length <= self.page_size + (self.page_size >> 8) + 64:
                raise self._corrupt(buffer, f"compressed page of {length} bytes")
            record = CompressedPage(block, page, buffer.peek(length, size + 4), continued)
            size += 4 + length
        buffer.skip(size)
        self._last_block = block
        return record

    def _named_block(self, buffer: ReadBuffer, continued: bool) -> tuple[int, int]:
        """Index of the record's block, and the bytes of the record before its payload."""
        if continued:
            if self._last_block is None:
                raise self._corrupt(buffer, "CONTINUE before any block was named")
            return self._last_block, 8
        length = buffer.uint(1, 8)
        name = buffer.peek(length, 9)
        block = self._index.get(name)
        if block is None:
            raise self._corrupt(
                buffer, "a page of a block that is not in the block list", name.decode("latin-1")
            )
        return block, 9 + length

    def _page(self, buffer: ReadBuffer, block: int, address: int) -> int:
        if address >= self._limits[block]:
            raise self._outside(buffer, block, address)
        return address // self.page_size

    def _decode_block_list(self, buffer: ReadBuffer, total: int) -> RamBlockList:
        if self.blocks:
            raise self._corrupt(buffer, "a second block list")
        if self._ram_limit_bytes is not None and total > self._ram_limit_bytes:
            raise StreamLimit(
                f"the guest has {total} bytes of RAM, the limit is {self._ram_limit_bytes}",
                position=buffer.position,
                section="ram",
                hint="raise -ram-limit",
            )
        blocks: list[RamBlockEntry] = []
        names: set[bytes] = set()
        at = 8
        missing = total
        while missing:
            if len(blocks) == self._block_limit:
                raise StreamLimit(
                    f"more than {self._block_limit} RAM blocks",
                    position=buffer.position,
                    section="ram",
                )
            entry, name, at = self._decode_entry(buffer, at)
            if name in names:
                raise self._corrupt(buffer, "a RAM block listed twice", entry.idstr)
            if entry.used_length > missing:
                raise self._corrupt(
                    buffer, f"RAM blocks exceed the total of {total} bytes", entry.idstr
                )
            names.add(name)
            blocks.append(entry)
            missing -= entry.used_length
        buffer.skip(at)
        self.blocks = tuple(blocks)
        self._index = {block.idstr.encode("latin-1"): i for i, block in enumerate(blocks)}
        self._limits = [block.used_length for block in blocks]
        return RamBlockList(total, self.blocks)

    def _decode_entry(self, buffer: ReadBuffer, at: int) -> tuple[RamBlockEntry, bytes, int]:
        length = buffer.uint(1, at)
        name = buffer.peek(length, at + 1)
        at += 1 + length
        used_length = buffer.uint(8, at)
        at += 8
        idstr = name.decode("latin-1")
        if not length or not idstr.isprintable():
            raise self._corrupt(buffer, f"RAM block name {name!r}")
        if used_length % self.page_size or used_length >= 1 << 62:
            raise self._corrupt(
                buffer, f"length {used_length} is no multiple of the target page size", idstr
            )
        address = mapped_ram = None
        if self._has_addresses:
            address = buffer.uint(8, at)
            at += 8
        if self._has_mapped_ram:
            mapped_ram = MappedRamHeader(
                version=buffer.uint(4, at),
                page_size=buffer.uint(8, at + 4),
                bitmap_position=buffer.uint(8, at + 12),
                pages_position=buffer.uint(8, at + 20),
            )
            at += 28
        return RamBlockEntry(idstr, used_length, None, address, mapped_ram), name, at

    def _outside(self, buffer: ReadBuffer, block: int, address: int) -> StreamCorrupt:
        entry = self.blocks[block]
        return self._corrupt(
            buffer,
            f"page at {address & ~(self.page_size - 1):#x} is outside the block of "
            f"{entry.used_length:#x} bytes",
            entry.idstr,
        )

    @staticmethod
    def _corrupt(buffer: ReadBuffer, message: str, block: str | None = None) -> StreamCorrupt:
        return StreamCorrupt(message, position=buffer.position, section="ram", block=block)

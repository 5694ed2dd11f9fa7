"""The body of the ``ram`` section: block list and page records.

    be64 word = address | flags      flags in the low bits, address a page offset
    [cstr8 block idstr]              only without CONTINUE
    payload                          PAGE: one target page; ZERO: the fill byte; ...

    MEM_SIZE:  { cstr8 idstr  be64 used_length  [be64 page_size]  [be64 address]}*

Reference: stream format 2. The hot path is ``codec/ram_rows.py``.
"""

import zlib

import numpy as np

from migrationd.codec.buffer import ReadBuffer
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
from migrationd.codec.ram_rows import (
    PAGE_CONTINUE,
    XBZRLE_CONTINUE,
    ZERO_CONTINUE,
    OutsideBlockError,
    RowReader,
)
from migrationd.codec.records import (
    CompressedPage,
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

_PAGE_KINDS = (
    RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_XBZRLE | RAM_SAVE_FLAG_COMPRESS_PAGE
)
_USED_LENGTH_LIMIT = 1 << 62


def inflate_page(compressed: bytes, page_size: int) -> bytes:
    """Contents of a COMPRESS_PAGE record.

    Raises:
        ValueError: Not one whole zlib stream of exactly one page.
    """
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(compressed, page_size)
        # The stream's check sum may stand behind the last byte of the page.
        page += inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(page) != page_size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"the compressed page is not one of {page_size} bytes")
    return page


class RamDecoder:
    """Decodes bodies of one ``ram`` section; the CONTINUE state lives across bodies.

    Args:
        page_size: Target page size in bytes.
        ram_limit_bytes: Largest sum of block lengths, or None.
        block_limit: Most blocks.
        has_addresses: Block entries carry a guest-physical address (``x-ignore-shared``).
        page_sizes: Backing page sizes of all blocks, or-ed, as ADVISE tells them; a block with
            another size than the normal one names it then. 0 without ADVISE.
    """

    def __init__(
        self,
        page_size: int,
        *,
        ram_limit_bytes: int | None,
        block_limit: int,
        has_addresses: bool = False,
        page_sizes: int = 0,
    ) -> None:
        self.page_size = page_size
        self.blocks: tuple[RamBlockEntry, ...] = ()
        self._ram_limit_bytes = ram_limit_bytes
        self._block_limit = block_limit
        self._has_addresses = has_addresses
        self._page_sizes = page_sizes
        self._index: dict[str, int] = {}
        self._last_block: int | None = None
        self._rows = RowReader(page_size)
        self._entries: list[RamBlockEntry] = []
        self._total_bytes: int | None = None
        self._unlisted_bytes = 0
        self._is_listing = False

    def fork(self, *, goes_on: bool = False) -> "RamDecoder":
        """A decoder of another channel with the same blocks: its CONTINUE state is its own.

        Args:
            goes_on: Whether that begins where this one's is now.
        """
        other = RamDecoder(
            self.page_size, ram_limit_bytes=self._ram_limit_bytes, block_limit=self._block_limit
        )
        other.blocks = self.blocks
        other._index = self._index
        other._total_bytes = self._total_bytes
        if goes_on:
            other._last_block = self._last_block
        return other

    def decode(self, buffer: ReadBuffer) -> RamRecord:
        """Decode what is at the cursor: one record, or a row of page records.

        Raises:
            NeedData: The record at the cursor is not complete.
            StreamCorrupt: The bytes contradict the format or the block list.
            StreamLimit: The block list asks for more than the limits.
            StreamUnsupported: A record that this program does not take.
        """
        if self._is_listing:
            return self._decode_block_list(buffer)
        word = buffer.uint(8)
        mask = self.page_size - 1
        flags = word & mask
        if flags in (PAGE_CONTINUE, ZERO_CONTINUE):
            return self._decode_row(buffer)
        if flags == XBZRLE_CONTINUE and (edits := self._decode_edits(buffer)) is not None:
            return edits
        return self._decode_one(buffer, word & ~mask, flags)

    def _decode_row(self, buffer: ReadBuffer) -> RamRecord:
        block = self._last_block
        if block is None:
            raise self._corrupt(buffer, "CONTINUE before any block was named")
        limit = self.blocks[block].used_length
        try:
            record, size = self._rows.read(
                buffer.data, buffer.start, buffer.end, block=block, limit=limit
            )
        except OutsideBlockError as error:
            buffer.skip(error.at - buffer.start)
            raise self._outside(buffer, block, error.address & (1 << 64) - 1) from None
        buffer.skip(size)
        return record

    def _decode_edits(self, buffer: ReadBuffer) -> RamRecord | None:
        block = self._last_block
        if block is None:
            return None
        limit = self.blocks[block].used_length
        start = buffer.start
        row = self._rows.read_edits(buffer.data, start, buffer.end, block=block, limit=limit)
        if row is not None:
            buffer.skip(int(row.ends[-1]) - start)
        return row

    def _decode_one(self, buffer: ReadBuffer, address: int, flags: int) -> RamRecord:
        if flags == RAM_SAVE_FLAG_MEM_SIZE:
            return self._begin_block_list(buffer, address)
        if flags in (RAM_SAVE_FLAG_EOS, RAM_SAVE_FLAG_MULTIFD_FLUSH):
            if address:
                raise self._corrupt(buffer, f"an end mark with address {address:#x}")
            buffer.skip(8)
            return RamEos() if flags == RAM_SAVE_FLAG_EOS else MultifdFlush()
        if flags == RAM_SAVE_FLAG_HOOK:
            raise StreamUnsupported(
                "an RDMA record", position=buffer.position, section="ram", hint="use tcp: or unix:"
            )
        kind = flags & ~RAM_SAVE_FLAG_CONTINUE
        if kind & ~_PAGE_KINDS or kind.bit_count() != 1:
            raise self._corrupt(buffer, f"RAM record with flags {flags:#x}")
        return self._decode_page(buffer, address, kind, bool(flags & RAM_SAVE_FLAG_CONTINUE))

    def _decode_page(
        self, buffer: ReadBuffer, address: int, kind: int, continued: bool
    ) -> RamRecord:
        block, size = self._named_block(buffer, continued)
        if address >= self.blocks[block].used_length:
            raise self._outside(buffer, block, address)
        page = address // self.page_size
        numbers = np.array([page], np.int64)
        record: RamRecord
        if kind == RAM_SAVE_FLAG_PAGE:
            at = buffer.require(self.page_size, size)
            content = np.frombuffer(buffer.data, np.uint8, self.page_size, at)
            record = PageBatch(block, numbers, content.reshape(1, -1), True, continued)
            size += self.page_size
        elif kind == RAM_SAVE_FLAG_ZERO:
            record = ZeroBatch(block, numbers, buffer.uint(1, size), continued)
            size += 1
        elif kind == RAM_SAVE_FLAG_XBZRLE:
            encoding, length = buffer.uint(1, size), buffer.uint(2, size + 1)
            if encoding != ENCODING_FLAG_XBZRLE:
                raise self._corrupt(buffer, f"XBZRLE page with encoding {encoding}", block)
            if not 0 < length <= self.page_size:
                raise self._corrupt(buffer, f"XBZRLE page of {length} bytes", block)
            record = XbzrlePage(block, page, buffer.peek(length, size + 3), continued)
            size += 3 + length
        else:
            length = buffer.uint(4, size)
            if not 0 < length <= _zlib_bound(self.page_size):
                raise self._corrupt(buffer, f"compressed page of {length} bytes", block)
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
        name = buffer.peek(length, 9).decode("latin-1")
        block = self._index.get(name)
        if block is None:
            raise self._corrupt(buffer, f"a page of block {name!r}, which is not in the list")
        return block, 9 + length

    def _begin_block_list(self, buffer: ReadBuffer, total: int) -> RamBlockList:
        if self._total_bytes is not None:
            raise self._corrupt(buffer, "a second block list")
        if self._ram_limit_bytes is not None and total > self._ram_limit_bytes:
            raise StreamLimit(
                f"the guest has {total} bytes of RAM, the limit is {self._ram_limit_bytes}",
                position=buffer.position,
                section="ram",
                hint="raise -ram-limit",
            )
        buffer.skip(8)
        self._total_bytes = self._unlisted_bytes = total
        self._is_listing = True
        return self._decode_block_list(buffer)

    def _decode_block_list(self, buffer: ReadBuffer) -> RamBlockList:
        """Go on with the block list; entries that arrived are never looked at again."""
        assert self._total_bytes is not None
        while self._unlisted_bytes:
            if len(self._entries) == self._block_limit:
                raise StreamLimit(
                    f"more than {self._block_limit} RAM blocks",
                    position=buffer.position,
                    section="ram",
                )
            self._decode_entry(buffer)
        self._is_listing = False
        self.blocks = tuple(self._entries)
        return RamBlockList(self._total_bytes, self.blocks)

    def _decode_entry(self, buffer: ReadBuffer) -> None:
        length = buffer.uint(1)
        name = buffer.peek(length, 1)
        idstr = name.decode("latin-1")
        at = 1 + length
        used_length = buffer.uint(8, at)
        at += 8
        page_size = self._backing_page_size(buffer, at)
        if page_size is not None:
            at += 8
        address = None
        if self._has_addresses:
            address = buffer.uint(8, at)
            at += 8
        if not length or not idstr.isprintable():
            raise self._corrupt(buffer, f"RAM block name {name!r}")
        if idstr in self._index:
            raise self._corrupt(buffer, f"RAM block {idstr!r} is listed twice")
        if used_length % self.page_size or not used_length or used_length >= _USED_LENGTH_LIMIT:
            raise self._corrupt(buffer, f"RAM block {idstr!r} of {used_length:#x} bytes")
        if used_length > self._unlisted_bytes:
            raise self._corrupt(
                buffer, f"RAM blocks exceed the total of {self._total_bytes} at {idstr!r}"
            )
        self._index[idstr] = len(self._entries)
        if page_size is not None and used_length % page_size:
            raise self._corrupt(
                buffer, f"RAM block {idstr!r} of {used_length:#x} bytes in pages of {page_size:#x}"
            )
        self._entries.append(RamBlockEntry(idstr, used_length, page_size, address))
        self._unlisted_bytes -= used_length
        buffer.skip(at)

    def _backing_page_size(self, buffer: ReadBuffer, at: int) -> int | None:
        """The field that only a block of other than normal pages has; None if it is not there.

        What else could be there begins with the length of a name, or is an end mark: neither
        is the size of a page that ADVISE spoke of.
        """
        if self._page_sizes in (0, self.page_size):
            return None
        size = buffer.uint(8, at)
        is_one = size > self.page_size and size & (size - 1) == 0 and size & self._page_sizes
        return size if is_one else None

    def _outside(self, buffer: ReadBuffer, block: int, address: int) -> StreamCorrupt:
        length = self.blocks[block].used_length
        return self._corrupt(
            buffer, f"page at {address:#x} is outside the block of {length:#x} bytes", block
        )

    def _corrupt(self, buffer: ReadBuffer, message: str, block: int | None = None) -> StreamCorrupt:
        idstr = None if block is None else self.blocks[block].idstr
        return StreamCorrupt(message, position=buffer.position, section="ram", block=idstr)


def _zlib_bound(size: int) -> int:
    """Most bytes that zlib makes of ``size`` bytes with its default settings."""
    return size + (size >> 12) + (size >> 14) + (size >> 25) + 13

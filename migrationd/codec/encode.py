"""Records back to bytes: each record of a decoded stream gives the bytes it came from."""

from typing import assert_never

import numpy as np

from migrationd.codec.command import encode_command
from migrationd.codec.constants import (
    ENCODING_FLAG_XBZRLE,
    QEMU_VM_EOF,
    QEMU_VM_VMDESCRIPTION,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_MULTIFD_FLUSH,
    RAM_SAVE_FLAG_XBZRLE,
)
from migrationd.codec.header import encode_configuration, encode_cstr8, encode_file_header
from migrationd.codec.ram_encode import (
    encode_block_list,
    encode_eos,
    encode_named_header,
    page_headers,
    zero_records,
)
from migrationd.codec.records import (
    Command,
    CompressedPage,
    Configuration,
    EndOfStream,
    FileHeader,
    MixedBatch,
    MultifdFlush,
    OpaqueSection,
    Package,
    PageBatch,
    RamBlockEntry,
    RamBlockList,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    VmDescription,
    XbzrleBatch,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.codec.section import encode_section_footer, encode_section_header


class StreamEncoder:
    """Encodes the records of one stream; remembers the block list for page records.

    Args:
        page_size: Target page size in bytes.
        blocks: Block list, if it is known before its record.
    """

    def __init__(self, page_size: int = 4096, blocks: tuple[RamBlockEntry, ...] = ()) -> None:
        self._page_size = page_size
        self._blocks = blocks

    def encode(self, record: Record) -> bytes:
        """Bytes of one record."""
        match record:
            case FileHeader():
                return encode_file_header(record)
            case Configuration():
                if record.target_page_bits is not None:
                    self._page_size = 1 << record.target_page_bits
                return encode_configuration(record)
            case Command():
                return encode_command(record)
            case Package():
                return b"".join(map(self.encode, record.records))
            case SectionHeader():
                return encode_section_header(
                    record.kind,
                    record.section_id,
                    record.idstr,
                    record.instance_id,
                    record.version_id,
                )
            case SectionFooter():
                return encode_section_footer(record.section_id)
            case OpaqueSection():
                return encode_opaque_section(record)
            case RamBlockList():
                self._blocks = record.blocks
                return encode_block_list(record.blocks, record.total_bytes)
            case XbzrleBatch():
                return self._encode_edits(record)
            case PageBatch() | ZeroBatch() | XbzrlePage() | CompressedPage():
                return self._encode_pages(record)
            case MixedBatch():
                return self._encode_mixed(record)
            case MultifdFlush():
                return RAM_SAVE_FLAG_MULTIFD_FLUSH.to_bytes(8, "big")
            case RamEos():
                return encode_eos()
            case EndOfStream():
                return bytes([QEMU_VM_EOF])
            case VmDescription():
                return encode_vmdescription(record.json)
            case _:
                assert_never(record)

    def _encode_edits(self, record: XbzrleBatch) -> bytes:
        return b"".join(self._encode_pages(record.single(i)) for i in range(len(record.pages)))

    def _encode_pages(self, record: PageBatch | ZeroBatch | XbzrlePage | CompressedPage) -> bytes:
        size = self._page_size
        if isinstance(record, PageBatch):
            if not record.continued:
                return self._named(record.block, int(record.pages[0])) + record.data.tobytes()
            return np.hstack((page_headers(record.pages, size), record.data)).tobytes()
        if isinstance(record, ZeroBatch):
            if not record.continued:
                head = self._named(record.block, int(record.pages[0]), is_zero=True)
                return head + bytes([record.fill])
            records = zero_records(record.pages, size)
            records[:, 8] = record.fill
            return records.tobytes()
        if isinstance(record, XbzrlePage):
            flag = RAM_SAVE_FLAG_XBZRLE
            payload = (
                bytes([ENCODING_FLAG_XBZRLE])
                + len(record.encoded).to_bytes(2, "big")
                + record.encoded
            )
        else:
            flag = RAM_SAVE_FLAG_COMPRESS_PAGE
            payload = len(record.compressed).to_bytes(4, "big") + record.compressed
        if record.continued:
            return (record.page * size | flag | RAM_SAVE_FLAG_CONTINUE).to_bytes(8, "big") + payload
        name = encode_cstr8(self._blocks[record.block].idstr)
        return (record.page * size | flag).to_bytes(8, "big") + name + payload

    def _encode_mixed(self, record: MixedBatch) -> bytes:
        size = self._page_size
        out = []
        for page, at in zip(record.pages, record.content_at, strict=True):
            number = np.array([page], np.int64)
            if at < 0:
                out.append(zero_records(number, size).tobytes())
            else:
                out.append(page_headers(number, size).tobytes() + record.buffer[at : at + size])
        return b"".join(out)

    def _named(self, block: int, page: int, *, is_zero: bool = False) -> bytes:
        return encode_named_header(
            page, self._page_size, self._blocks[block].idstr, is_zero=is_zero
        )


def encode_opaque_section(section: OpaqueSection) -> bytes:
    """Header, body and, if it had one, footer."""
    out = (
        encode_section_header(
            section.kind,
            section.section_id,
            section.idstr,
            section.instance_id,
            section.version_id,
        )
        + section.body
    )
    return out + encode_section_footer(section.section_id) if section.has_footer else out


def encode_vmdescription(description: bytes) -> bytes:
    """VMDESCRIPTION with its type byte."""
    return bytes([QEMU_VM_VMDESCRIPTION]) + len(description).to_bytes(4, "big") + description

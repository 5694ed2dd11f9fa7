"""The records of a migration stream, in the order in which a decoder yields them.

Arrays of a record are views into the decoder's buffer: they hold until the next
call of the decoder.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PageNumbers = npt.NDArray[np.int64]
PageData = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Magic and version."""

    version: int


@dataclass(frozen=True, slots=True)
class Configuration:
    """CONFIGURATION: machine type and, where present, its subsections.

    Attributes:
        machine: Versioned machine type name.
        target_page_bits: Of targets with a variable page size, else None.
        capabilities: Names of the validated capabilities that are on; None if not sent.
        uuid: 16 bytes, or None.
    """

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """COMMAND with its payload; its length was checked."""

    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """Head of a section whose body is decoded (``ram``).

    For PART and END idstr, instance and version are those of its START.
    """

    kind: int
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SectionFooter:
    """Footer of a section whose body is decoded."""

    section_id: int


@dataclass(frozen=True, slots=True)
class OpaqueSection:
    """A whole section that nobody here decodes, with its footer if it had one."""

    kind: int
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    body: bytes
    has_footer: bool


@dataclass(frozen=True, slots=True)
class MappedRamHeader:
    """What follows a block's entry when ``mapped-ram`` is on; positions are in the file."""

    version: int
    page_size: int
    bitmap_position: int
    pages_position: int


@dataclass(frozen=True, slots=True)
class RamBlockEntry:
    """One entry of the block list; optional fields are None when they are not on the wire."""

    idstr: str
    used_length: int
    page_size: int | None = None
    address: int | None = None
    mapped_ram: MappedRamHeader | None = None


@dataclass(frozen=True, slots=True)
class RamBlockList:
    """MEM_SIZE record with the list of RAM blocks."""

    total_bytes: int
    blocks: tuple[RamBlockEntry, ...]


@dataclass(frozen=True, slots=True)
class PageBatch:
    """PAGE records that follow one another.

    Attributes:
        block: Index into the block list.
        pages: Target page numbers, shape ``(n,)``.
        data: Contents, shape ``(n, page size)``, not contiguous.
        is_run: Whether the numbers are consecutive.
        continued: Whether the records carry CONTINUE; else n is 1 and the block is named.
    """

    block: int
    pages: PageNumbers
    data: PageData
    is_run: bool
    continued: bool


@dataclass(frozen=True, slots=True)
class ZeroBatch:
    """ZERO records that follow one another; ``fill`` is the byte that fills the pages."""

    block: int
    pages: PageNumbers
    fill: int
    continued: bool


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """PAGE|CONTINUE and ZERO|CONTINUE (fill 0) records in short alternation, in order.

    Attributes:
        block: Index into the block list.
        pages: Target page numbers.
        content_at: Index in ``buffer`` of each page's content; -1 for a zero page.
        buffer: The decoder's input buffer.
    """

    block: int
    pages: list[int]
    content_at: list[int]
    buffer: bytearray


@dataclass(frozen=True, slots=True)
class XbzrlePage:
    """An XBZRLE record: an edit of the page's previous content."""

    block: int
    page: int
    encoded: bytes
    continued: bool


@dataclass(frozen=True, slots=True)
class XbzrleBatch:
    """XBZRLE|CONTINUE records in a row, in order.

    Attributes:
        block: Index into the block list.
        pages: Target page numbers, shape ``(n,)``; a page may be there twice.
        begins: Index in ``buffer`` of each edit, shape ``(n,)``.
        ends: Index behind it, shape ``(n,)``.
        buffer: The decoder's input buffer.
    """

    block: int
    pages: PageNumbers
    begins: PageNumbers
    ends: PageNumbers
    buffer: bytearray

    def single(self, index: int) -> XbzrlePage:
        """One of them as a record of its own."""
        edit = bytes(self.buffer[int(self.begins[index]) : int(self.ends[index])])
        return XbzrlePage(self.block, int(self.pages[index]), edit, True)


@dataclass(frozen=True, slots=True)
class CompressedPage:
    """A COMPRESS_PAGE record (up to QEMU 9.0): one zlib stream for one page."""

    block: int
    page: int
    compressed: bytes
    continued: bool


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """MULTIFD_FLUSH: a synchronisation point of the channels."""


@dataclass(frozen=True, slots=True)
class RamEos:
    """End of a RAM body."""


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """The final EOF byte."""


@dataclass(frozen=True, slots=True)
class VmDescription:
    """VMDESCRIPTION; the JSON as it came."""

    json: bytes


RamRecord = (
    RamBlockList
    | PageBatch
    | ZeroBatch
    | MixedBatch
    | XbzrlePage
    | XbzrleBatch
    | CompressedPage
    | MultifdFlush
    | RamEos
)

StreamRecord = (
    FileHeader
    | Configuration
    | Command
    | SectionHeader
    | SectionFooter
    | OpaqueSection
    | RamRecord
    | EndOfStream
    | VmDescription
)


@dataclass(frozen=True, slots=True)
class Package:
    """The nested stream that follows a PACKAGED command.

    Attributes:
        records: Its commands and device sections, in order.
    """

    records: tuple[StreamRecord, ...]


Record = StreamRecord | Package

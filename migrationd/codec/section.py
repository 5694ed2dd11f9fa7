"""Section headers and footers.

    START, FULL:  type  be32 section_id  cstr8 idstr  be32 instance_id  be32 version_id  body
    PART, END:    type  be32 section_id  body
    footer:       7e    be32 section_id

Reference: stream format 1.2.
"""

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.header import encode_cstr8
from migrationd.codec.records import SectionHeader
from migrationd.errors import StreamCorrupt, StreamLimit

SECTION_LIMIT = 65536
"""Sections of one stream; the largest real machines have some hundreds."""


class SectionTable:
    """Which live handler a section id stands for; bound at START.

    FULL sections are whole: their ids stand for nothing afterwards.
    """

    def __init__(self) -> None:
        self._headers: dict[int, SectionHeader] = {}

    def is_live(self, section_id: int) -> bool:
        """Whether PART and END sections of this id may come."""
        return section_id in self._headers

    def decode_header(self, buffer: ReadBuffer) -> tuple[SectionHeader, int]:
        """Decode the header at the cursor, which stays where it is.

        Returns:
            The header, and its length in bytes.

        Raises:
            NeedData: It is not complete.
            StreamCorrupt: Unknown section id, or an id that is used twice.
        """
        kind = buffer.uint(1)
        section_id = buffer.uint(4, 1)
        if kind in (QEMU_VM_SECTION_PART, QEMU_VM_SECTION_END):
            known = self._headers.get(section_id)
            if known is None:
                raise StreamCorrupt(
                    f"section id {section_id} was never started", position=buffer.position
                )
            return (
                SectionHeader(kind, section_id, known.idstr, known.instance_id, known.version_id),
                5,
            )
        length = buffer.uint(1, 5)
        raw = buffer.peek(length, 6)
        header = SectionHeader(
            kind,
            section_id,
            raw.decode("latin-1"),
            buffer.uint(4, 6 + length),
            buffer.uint(4, 10 + length),
        )
        if not length or not header.idstr.isprintable():
            raise StreamCorrupt(f"section name {raw!r}", position=buffer.position)
        return header, 14 + length

    def bind(self, header: SectionHeader, buffer: ReadBuffer) -> None:
        """Remember a START header.

        Raises:
            StreamCorrupt: The id already stands for another section.
            StreamLimit: Too many sections.
        """
        if header.kind != QEMU_VM_SECTION_START:
            return
        if header.section_id in self._headers:
            raise StreamCorrupt(
                f"duplicate section id {header.section_id}",
                position=buffer.position,
                section=header.idstr,
            )
        if len(self._headers) >= SECTION_LIMIT:
            raise StreamLimit(f"more than {SECTION_LIMIT} sections", position=buffer.position)
        self._headers[header.section_id] = header


def encode_section_header(
    kind: int, section_id: int, idstr: str = "", instance_id: int = 0, version_id: int = 0
) -> bytes:
    """Encode a section header; PART and END use the id only."""
    out = bytes([kind]) + section_id.to_bytes(4, "big")
    if kind in (QEMU_VM_SECTION_START, QEMU_VM_SECTION_FULL):
        out += encode_cstr8(idstr) + instance_id.to_bytes(4, "big") + version_id.to_bytes(4, "big")
    return out


def encode_section_footer(section_id: int) -> bytes:
    """Encode a footer."""
    return bytes([QEMU_VM_SECTION_FOOTER]) + section_id.to_bytes(4, "big")

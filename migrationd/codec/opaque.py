"""Sections that are kept as bytes, from their header to what is behind them.

FULL sections that follow one another are held back until the element behind them
proves the framing: any other element, or the VMDESCRIPTION, which names them. If it
names others, or a footer never comes, the row is cut anew.

Reference: stream format 7.6.
"""

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.constants import QEMU_VM_EOF, QEMU_VM_SECTION_FULL
from migrationd.codec.encode import encode_opaque_section
from migrationd.codec.framing import FOOTER_BYTES, SectionFramer
from migrationd.codec.live_body import measure_of
from migrationd.codec.records import OpaqueSection, SectionHeader
from migrationd.codec.reframe import DescriptionFinder, cut, described, find_description_at_end
from migrationd.codec.section import SECTION_LIMIT, SectionTable, encode_section_footer
from migrationd.codec.vmdescription import DeviceSize
from migrationd.errors import StreamCorrupt, StreamLimit, StreamTruncated, StreamUnsupported


class OpaqueReader:
    """Reads opaque sections; one at a time is at the cursor of the buffer.

    Args:
        buffer: The decoder's input.
        table: Its section table.
        section_limit: Most bytes of a body, and of all bodies that are held back.
        description_limit: Most bytes of a VMDESCRIPTION.
    """

    def __init__(
        self,
        buffer: ReadBuffer,
        table: SectionTable,
        *,
        section_limit: int,
        description_limit: int,
    ) -> None:
        self._buffer = buffer
        self._table = table
        self._section_limit = section_limit
        self._description_limit = description_limit
        self._held: list[OpaqueSection] = []
        self._held_bytes = 0
        self._released: list[DeviceSize] = []
        self._header: SectionHeader | None = None
        self._header_bytes = 0
        self._framer: SectionFramer | None = None
        self._finder: DescriptionFinder | None = None

    def begin(self, header: SectionHeader, header_bytes: int) -> None:
        """Begin a section whose header, of that length, is at the cursor."""
        self._header = header
        self._header_bytes = header_bytes
        self._finder = DescriptionFinder(header_bytes, self._description_limit)
        self._framer = SectionFramer(
            header.section_id,
            header.idstr,
            header_bytes,
            self._section_limit,
            measure_of(header.idstr, header.version_id)
            if header.kind != QEMU_VM_SECTION_FULL
            else None,
        )

    def read(self, *, has_footers: bool, quiet: bool) -> OpaqueSection | None:
        """Read the section on; the cursor is behind it afterwards.

        Returns:
            A live section; None for a FULL one, which is held back.

        Raises:
            NeedData: It is not complete.
            StreamCorrupt: Its footer is missing.
            StreamLimit: It exceeds the limit.
            StreamTruncated: The input ended inside it.
            StreamUnsupported: There is no way to tell where it ends.
        """
        header, buffer = self._header, self._buffer
        assert header is not None
        if header.kind == QEMU_VM_SECTION_FULL and not has_footers:
            self._read_described_row(header)
            return None
        try:
            length = self._body_length(header, has_footers=has_footers, quiet=quiet)
        except NeedData:
            if buffer.is_ended or quiet:
                self._recover(header)
                return None
            raise
        section = self._section(header, length, has_footer=has_footers)
        buffer.skip(self._header_bytes + length + (FOOTER_BYTES if has_footers else 0))
        if header.kind != QEMU_VM_SECTION_FULL:
            return section
        self._hold(section)
        return None

    def release(self) -> list[OpaqueSection]:
        """The sections held back; something else than a FULL section follows them."""
        held, self._held = self._held, []
        self._held_bytes = 0
        self._released += _sizes(held)
        return held

    def settle(self, description: bytes) -> list[OpaqueSection]:
        """The sections held back, compared with the VMDESCRIPTION that follows them.

        Raises:
            StreamCorrupt: It names other sections, and no other framing agrees with it.
        """
        devices = described(description)
        before, expected = devices[: len(self._released)], devices[len(self._released) :]
        if devices and expected != _sizes(self._held) and _same(before, self._released):
            raw = b"".join(map(encode_opaque_section, self._held))
            self._held = cut(raw, expected, has_footers=self._has_footers()) or self._held
        found = self._released + _sizes(self._held)
        if devices and not _same(devices, found):
            raise StreamCorrupt(
                f"the description lists {len(devices)} device sections, the stream has "
                f"{len(found)}: {_first_difference(devices, found)}",
                position=self._buffer.position,
                section="VMDESCRIPTION",
            )
        return self.release()

    def _has_footers(self) -> bool:
        return all(section.has_footer for section in self._held)

    def _body_length(self, header: SectionHeader, *, has_footers: bool, quiet: bool) -> int:
        buffer, framer = self._buffer, self._framer
        assert framer is not None
        if measure_of(header.idstr, header.version_id) is None or (
            header.kind == QEMU_VM_SECTION_FULL
        ):
            if not has_footers:
                raise self._unframed(header, "use a machine type that sends section footers")
            return framer.body_length(buffer, self._table, quiet=quiet)
        length = framer.measured_length(buffer)
        if has_footers:
            at = self._header_bytes + length
            if buffer.peek(FOOTER_BYTES, at) != encode_section_footer(header.section_id):
                raise StreamCorrupt(
                    "the section footer is missing",
                    position=buffer.position + at,
                    section=header.idstr,
                )
        return length

    def _section(self, header: SectionHeader, length: int, *, has_footer: bool) -> OpaqueSection:
        return OpaqueSection(
            header.kind,
            header.section_id,
            header.idstr,
            header.instance_id,
            header.version_id,
            self._buffer.peek(length, self._header_bytes),
            has_footer,
        )

    def _hold(self, section: OpaqueSection) -> None:
        self._held.append(section)
        self._held_bytes += len(section.body)
        if self._held_bytes > self._section_limit:
            raise StreamLimit(
                f"device sections of more than {self._section_limit} bytes",
                position=self._buffer.position,
                section=section.idstr,
            )
        if len(self._released) + len(self._held) > SECTION_LIMIT:
            raise StreamLimit(
                f"more than {SECTION_LIMIT} device sections", position=self._buffer.position
            )

    def _recover(self, header: SectionHeader) -> None:
        """No footer was found and nothing comes: cut the row by the description at the end.

        Raises:
            NeedData: There is none yet.
            StreamTruncated: There is none, and the input has ended.
        """
        buffer = self._buffer
        held = b"".join(map(encode_opaque_section, self._held))
        for at, description in find_description_at_end(buffer, self._description_limit):
            expected = described(description)[len(self._released) :]
            sections = cut(held + buffer.peek(at), expected, has_footers=True)
            if sections is not None:
                self._held = sections
                buffer.skip(at)
                return
        if not buffer.is_ended:
            raise NeedData
        raise StreamTruncated(
            "the input ended inside a section", position=buffer.position, section=header.idstr
        )

    def _read_described_row(self, header: SectionHeader) -> None:
        """All FULL sections of a stream without footers: the description tells the sizes."""
        buffer = self._buffer
        if len(buffer) > self._section_limit + self._description_limit:
            raise StreamLimit(
                f"device sections of more than {self._section_limit} bytes",
                position=buffer.position,
                section=header.idstr,
            )
        assert self._finder is not None
        places = self._finder.find(buffer)
        if buffer.is_ended:
            places = find_description_at_end(buffer, self._description_limit)
        for at, description in places:
            expected = described(description)[len(self._released) :]
            sections = cut(buffer.peek(at), expected, has_footers=False)
            if sections is not None:
                self._held += sections
                buffer.skip(at)
                return
        if not buffer.is_ended:
            raise NeedData
        self._keep_tail(header)

    def _keep_tail(self, header: SectionHeader) -> None:
        """Neither footers nor a description: the rest of the stream is one section."""
        buffer = self._buffer
        length = len(buffer) - self._header_bytes - 1
        if length < 0 or buffer.data[buffer.end - 1] != QEMU_VM_EOF:
            raise StreamTruncated(
                "the input ended before the end of the stream",
                position=buffer.position + len(buffer),
                section=header.idstr,
            )
        self._hold(self._section(header, length, has_footer=False))
        buffer.skip(self._header_bytes + length)

    def _unframed(self, header: SectionHeader, hint: str) -> StreamUnsupported:
        return StreamUnsupported(
            "nothing tells where the section ends",
            position=self._buffer.position,
            section=header.idstr,
            hint=hint,
        )


def _sizes(sections: list[OpaqueSection]) -> list[DeviceSize]:
    return [DeviceSize(s.idstr, s.instance_id, len(s.body)) for s in sections]


def _same(left: list[DeviceSize], right: list[DeviceSize]) -> bool:
    """Whether names and instances agree; described sizes can be wrong."""
    return [(d.idstr, d.instance_id) for d in left] == [(d.idstr, d.instance_id) for d in right]


def _first_difference(described_: list[DeviceSize], found: list[DeviceSize]) -> str:
    for left, right in zip(described_, found, strict=False):
        if not _same([left], [right]):
            return (
                f"'{left.idstr}' instance {left.instance_id} is described where "
                f"'{right.idstr}' instance {right.instance_id} was found"
            )
    longer = described_ if len(described_) > len(found) else found
    extra = longer[min(len(described_), len(found))]
    return f"'{extra.idstr}' instance {extra.instance_id} is in one of them only"

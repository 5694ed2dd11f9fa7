"""The main stream as a state machine: bytes in, records out.

The decoder knows no guest and no channel. It never allocates for a length that it
has not checked, and each error names the stream position.

Reference: stream format 1, 2, 4 and 7.6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.command import decode_command
from migrationd.codec.constants import (
    MIG_CMD_PACKAGED,
    QEMU_VM_COMMAND,
    QEMU_VM_CONFIGURATION,
    QEMU_VM_EOF,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_START,
    QEMU_VM_VMDESCRIPTION,
    RAM_SECTION_VERSION,
    TARGET_PAGE_BITS_DEFAULT,
)
from migrationd.codec.framing import FooterFramer, frame_by_description
from migrationd.codec.header import decode_configuration, decode_file_header
from migrationd.codec.ram import RamDecoder
from migrationd.codec.records import (
    Configuration,
    EndOfStream,
    OpaqueSection,
    Package,
    RamBlockEntry,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    VmDescription,
)
from migrationd.codec.section import SectionTable
from migrationd.codec.vmdescription import device_sizes
from migrationd.errors import StreamCorrupt, StreamLimit, StreamTruncated, StreamUnsupported


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What a peer may ask for.

    Attributes:
        ram_bytes: Sum of all RAM blocks; None for no limit.
        ram_blocks: Number of RAM blocks.
        section_bytes: Body of one opaque section.
        package_bytes: One PACKAGED stream.
        description_bytes: VMDESCRIPTION.
    """

    ram_bytes: int | None = None
    ram_blocks: int = 4096
    section_bytes: int = 256 << 20
    package_bytes: int = 256 << 20
    description_bytes: int = 16 << 20


class _State(Enum):
    HEADER = auto()
    CONFIGURATION = auto()
    ELEMENT = auto()
    OPAQUE = auto()
    RAM_BODY = auto()
    RAM_FOOTER = auto()
    PACKAGE = auto()
    DESCRIPTION = auto()
    FINISHED = auto()


class StreamDecoder:
    """Incremental decoder of one main stream.

    Args:
        limits: What the peer may ask for.
        buffer_bytes: Size of the input buffer; small enough to stay in a core's cache.
    """

    def __init__(
        self, limits: StreamLimits | None = None, *, buffer_bytes: int = 512 << 10
    ) -> None:
        self._limits = limits or StreamLimits()
        largest = max(
            self._limits.section_bytes, self._limits.package_bytes, self._limits.description_bytes
        )
        self._buffer = ReadBuffer(buffer_bytes, largest + (64 << 10))
        self._state = _State.HEADER
        self._table = SectionTable()
        self._ram: RamDecoder | None = None
        self._configuration: Configuration | None = None
        self._section: SectionHeader | None = None
        self._framer: FooterFramer | None = None
        self._opaque_header_bytes = 0
        self._sizes: list[tuple[str, int, int]] | None = None
        self._has_footers: bool | None = None
        self._devices: list[tuple[str, int, int]] = []
        self._package_bytes = 0
        self._quiet = False
        self._steps: dict[_State, Callable[[], Record | None]] = {
            _State.HEADER: self._header,
            _State.CONFIGURATION: self._configure,
            _State.ELEMENT: self._element,
            _State.OPAQUE: self._opaque,
            _State.RAM_BODY: self._ram_body,
            _State.RAM_FOOTER: self._ram_footer,
            _State.PACKAGE: self._package,
            _State.DESCRIPTION: self._description,
        }

    @property
    def position(self) -> int:
        """Stream position of the next undecoded byte."""
        return self._buffer.position

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        configuration = self._configuration
        bits = configuration.target_page_bits if configuration else None
        return 1 << (bits or TARGET_PAGE_BITS_DEFAULT)

    @property
    def blocks(self) -> tuple[RamBlockEntry, ...]:
        """RAM blocks, once their list was decoded."""
        return self._ram.blocks if self._ram else ()

    @property
    def section(self) -> str | None:
        """Name of the section at the cursor."""
        return self._section.idstr if self._section else None

    @property
    def finished(self) -> bool:
        """Whether the stream is complete, its optional description included."""
        return self._state is _State.FINISHED

    def receive_view(self) -> memoryview:
        """Space for the next bytes; invalidates arrays of earlier records."""
        return self._buffer.free_view()

    def received(self, count: int) -> None:
        """Account for bytes written into :meth:`receive_view`."""
        self._quiet = False
        self._buffer.added(count)

    def feed(self, data: bytes | memoryview) -> None:
        """Append a copy of ``data``."""
        self._quiet = False
        self._buffer.feed(data)

    def feed_eof(self) -> None:
        """Say that no more input comes."""
        self._buffer.is_ended = True

    def idle(self) -> None:
        """Say that nothing came for a while.

        Only an EOF byte with nothing behind it is judged by this: the machine types that
        suppress the VMDESCRIPTION end so.
        """
        self._quiet = True

    def next_record(self) -> Record | None:
        """Decode the next record.

        Returns:
            The record, or None when more input is needed or the stream is finished.

        Raises:
            StreamError: With position, section and block.
        """
        while self._state is not _State.FINISHED:
            try:
                record_or_none = self._steps[self._state]()
            except NeedData:
                if not self._buffer.is_ended:
                    return None
                raise StreamTruncated(
                    "the input ended before the end of the stream",
                    position=self.position + len(self._buffer),
                    section=self.section,
                ) from None
            if record_or_none is not None:
                return record_or_none
        return None

    def _header(self) -> Record:
        record = decode_file_header(self._buffer)
        self._state = _State.CONFIGURATION
        return record

    def _configure(self) -> Record | None:
        if self._buffer.uint(1) != QEMU_VM_CONFIGURATION:
            self._state = _State.ELEMENT
            return None
        self._configuration = decode_configuration(self._buffer)
        self._state = _State.ELEMENT
        return self._configuration

    def _element(self) -> Record | None:
        buffer = self._buffer
        kind = buffer.uint(1)
        if kind == QEMU_VM_COMMAND:
            command = decode_command(buffer)
            if command.number == MIG_CMD_PACKAGED:
                self._package_bytes = int.from_bytes(command.payload, "big")
                if self._package_bytes > self._limits.package_bytes:
                    raise StreamLimit(
                        f"a package of {self._package_bytes} bytes", position=self.position
                    )
                self._state = _State.PACKAGE
            return command
        if kind == QEMU_VM_EOF:
            buffer.skip(1)
            self._state = _State.DESCRIPTION
            return EndOfStream()
        if QEMU_VM_SECTION_START <= kind <= QEMU_VM_SECTION_FULL:
            return self._begin_section()
        raise StreamCorrupt(f"unknown element type {kind:#04x}", position=self.position)

    def _begin_section(self) -> Record | None:
        header, size = self._table.decode_header(self._buffer)
        self._table.bind(header, self._buffer)
        self._section = header
        if header.idstr == "ram" and header.kind != QEMU_VM_SECTION_FULL:
            self._begin_ram(header)
            self._buffer.skip(size)
            self._state = _State.RAM_BODY
            return header
        self._opaque_header_bytes = size
        self._framer = FooterFramer(
            header.section_id, header.idstr, size, self._limits.section_bytes
        )
        self._state = _State.OPAQUE
        return None

    def _begin_ram(self, header: SectionHeader) -> None:
        if header.version_id != RAM_SECTION_VERSION:
            raise StreamUnsupported(
                f"version {header.version_id}, only {RAM_SECTION_VERSION} is known",
                position=self.position,
                section="ram",
            )
        if header.kind != QEMU_VM_SECTION_START:
            return
        if self._ram is not None:
            raise StreamCorrupt("duplicate section", position=self.position, section="ram")
        configuration = self._configuration
        capabilities = (configuration.capabilities if configuration else None) or ()
        self._ram = RamDecoder(
            self.page_size,
            ram_limit_bytes=self._limits.ram_bytes,
            block_limit=self._limits.ram_blocks,
            has_addresses="x-ignore-shared" in capabilities,
            has_mapped_ram="mapped-ram" in capabilities,
        )
        if "mapped-ram" in capabilities:
            raise StreamUnsupported(
                "a mapped-ram file is no stream",
                position=self.position,
                section="ram",
                hint="open it as a file at rest",
            )

    def _ram_body(self) -> Record:
        assert self._ram is not None
        record = self._ram.decode(self._buffer)
        if isinstance(record, RamEos):
            self._state = _State.RAM_FOOTER
        return record

    def _ram_footer(self) -> Record | None:
        section = self._section
        assert section is not None
        if self._has_footers is None:
            self._has_footers = self._buffer.uint(1) == QEMU_VM_SECTION_FOOTER
        if self._has_footers:
            if self._buffer.uint(1) != QEMU_VM_SECTION_FOOTER:
                raise StreamCorrupt(
                    "the section footer is missing", position=self.position, section=section.idstr
                )
            found = self._buffer.uint(4, 1)
            if found != section.section_id:
                raise StreamCorrupt(
                    f"the footer names section {found}, not {section.section_id}",
                    position=self.position,
                    section=section.idstr,
                )
            self._buffer.skip(5)
        self._section = None
        self._state = _State.ELEMENT
        return SectionFooter(section.section_id) if self._has_footers else None

    def _opaque(self) -> Record:
        header, framer = self._section, self._framer
        assert header is not None and framer is not None
        if self._has_footers is False:
            length = self._length_by_description(header)
        else:
            length = framer.body_length(self._buffer, self._table, quiet=self._quiet)
        body = self._buffer.peek(length, self._opaque_header_bytes)
        has_footer = self._has_footers is not False
        self._buffer.skip(self._opaque_header_bytes + length + (5 if has_footer else 0))
        if header.kind == QEMU_VM_SECTION_FULL:
            self._devices.append((header.idstr, header.instance_id, length))
        self._section = self._framer = None
        self._state = _State.ELEMENT
        return OpaqueSection(
            header.kind,
            header.section_id,
            header.idstr,
            header.instance_id,
            header.version_id,
            body,
            has_footer,
        )

    def _length_by_description(self, header: SectionHeader) -> int:
        if header.kind != QEMU_VM_SECTION_FULL:
            raise StreamUnsupported(
                "a live section without footers cannot be framed",
                position=self.position,
                section=header.idstr,
            )
        if self._sizes is None:
            if len(self._buffer) > self._limits.section_bytes:
                raise StreamLimit(
                    f"device sections of more than {self._limits.section_bytes} bytes",
                    position=self.position,
                )
            if not (self._buffer.is_ended or self._quiet):
                raise NeedData
            try:
                self._sizes, _ = frame_by_description(
                    self._buffer, self._limits.description_bytes
                )
            except NeedData:
                if not self._buffer.is_ended:
                    raise
                raise StreamUnsupported(
                    "neither footers nor a description tell where device sections end",
                    position=self.position,
                    section=header.idstr,
                    hint="use a machine type newer than 2.2",
                ) from None
        index = len(self._devices)
        name, instance, size = (*self._sizes[index : index + 1], ("", 0, 0))[0]
        if (name, instance) != (header.idstr, header.instance_id):
            raise StreamCorrupt(
                f"the description names '{name}' here", position=self.position, section=header.idstr
            )
        return size

    def _package(self) -> Record:
        body = self._buffer.peek(self._package_bytes)
        self._buffer.skip(self._package_bytes)
        self._state = _State.ELEMENT
        return Package(body)

    def _description(self) -> Record | None:
        buffer = self._buffer
        if not len(buffer):
            if not (buffer.is_ended or self._quiet):
                raise NeedData
            self._state = _State.FINISHED
            return None
        if buffer.uint(1) != QEMU_VM_VMDESCRIPTION:
            self._state = _State.FINISHED
            return None
        length = buffer.uint(4, 1)
        if length > self._limits.description_bytes:
            raise StreamLimit(
                f"a VMDESCRIPTION of {length} bytes, the limit is "
                f"{self._limits.description_bytes}",
                position=self.position,
                section="VMDESCRIPTION",
            )
        description = buffer.peek(length, 5)
        self._check_description(description)
        buffer.skip(5 + length)
        self._state = _State.FINISHED
        return VmDescription(description)

    def _check_description(self, description: bytes) -> None:
        """Sections that were framed wrongly show here; sizes alone prove nothing."""
        try:
            named = [(name, instance) for name, instance, _ in device_sizes(description)]
        except ValueError:
            return
        found = [(name, instance) for name, instance, _ in self._devices]
        if named and named != found:
            missing = [name for name in named if name not in found]
            raise StreamCorrupt(
                f"the description lists {len(named)} device sections, the stream has "
                f"{len(found)}" + (f"; missing: {missing[0][0]}" if missing else ""),
                position=self.position,
                section="VMDESCRIPTION",
            )


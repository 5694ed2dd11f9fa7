"""The main stream as a state machine: bytes in, records out.

The decoder knows no guest and no channel. It never allocates for a length that it
has not checked, and each error names the stream position.

Reference: stream format 1, 2, 4 and 7.6.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.command import decode_command
from migrationd.codec.constants import (
    MIG_CMD_PACKAGED,
    MIG_CMD_POSTCOPY_ADVISE,
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
from migrationd.codec.header import decode_configuration, decode_file_header
from migrationd.codec.opaque import OpaqueReader
from migrationd.codec.package import decode_package
from migrationd.codec.ram import RamDecoder
from migrationd.codec.records import (
    Command,
    Configuration,
    EndOfStream,
    OpaqueSection,
    RamBlockEntry,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    VmDescription,
)
from migrationd.codec.section import SectionTable
from migrationd.errors import (
    InvalidState,
    StreamCorrupt,
    StreamError,
    StreamLimit,
    StreamTruncated,
    StreamUnsupported,
)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What a peer may ask for.

    Attributes:
        ram_bytes: Sum of all RAM blocks; None for no limit.
        ram_blocks: Number of RAM blocks.
        section_bytes: Body of one opaque section, and all device sections that come in a row.
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
        page_size: Target page size in bytes, where CONFIGURATION does not tell it.
        buffer_bytes: Size of the input buffer; small enough to stay in a core's cache.
    """

    def __init__(
        self,
        limits: StreamLimits | None = None,
        *,
        page_size: int = 1 << TARGET_PAGE_BITS_DEFAULT,
        buffer_bytes: int = 512 << 10,
    ) -> None:
        self._limits = limits = limits or StreamLimits()
        largest = (
            max(limits.section_bytes, limits.package_bytes) + limits.description_bytes + (1 << 20)
        )
        self._buffer = ReadBuffer(buffer_bytes, largest)
        self._page_size = page_size
        self._state = _State.HEADER
        self._table = SectionTable()
        self._opaque_reader = OpaqueReader(
            self._buffer,
            self._table,
            section_limit=limits.section_bytes,
            description_limit=limits.description_bytes,
        )
        self._ram: RamDecoder | None = None
        self._configuration: Configuration | None = None
        self._ready: deque[Record] = deque()
        self._section: SectionHeader | None = None
        self._has_footers: bool | None = None
        self._page_sizes = 0
        self._package_bytes = 0
        self._is_postcopy = False
        self._quiet = False
        self._error: StreamError | None = None
        self._end_position: int | None = None

    def resumed(self) -> "StreamDecoder":
        """A decoder of the connection that goes on with this stream after its loss.

        It begins between two elements, and knows the sections and blocks of the lost one. What
        had arrived in part is forgotten, and so is the last block.

        Raises:
            InvalidState: The stream had not turned to postcopy.
        """
        if not self._is_postcopy or self._ram is None:
            raise InvalidState("only a stream that turned to postcopy can be resumed")
        return self._successor(self._ram.fork())

    def checkpoint(self) -> "StreamDecoder":
        """A decoder of sections that follow this stream, without head and description, up to EOF.

        Raises:
            InvalidState: The stream has no RAM section.
        """
        if self._ram is None:
            raise InvalidState("a checkpoint needs RAM blocks")
        return self._successor(self._ram.fork(goes_on=True))

    def _successor(self, ram: RamDecoder) -> "StreamDecoder":
        other = StreamDecoder(self._limits, page_size=self._page_size)
        other._table = self._table
        other._opaque_reader = OpaqueReader(
            other._buffer,
            self._table,
            section_limit=self._limits.section_bytes,
            description_limit=self._limits.description_bytes,
        )
        other._ram = ram
        other._configuration = self._configuration
        other._has_footers = self._has_footers
        other._is_postcopy = True
        other._state = _State.ELEMENT
        return other

    def fork_ram(self) -> RamDecoder | None:
        """A decoder for RAM records that come on another channel; None before the block list."""
        return self._ram.fork() if self._ram is not None else None

    @property
    def position(self) -> int:
        """Stream position of the next undecoded byte; of the stream's end when finished."""
        return self._buffer.position if self._end_position is None else self._end_position

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return self._page_size

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
        return self._state is _State.FINISHED and not self._ready

    def receive_view(self) -> memoryview:
        """Space for the next bytes, at least 64 KiB; invalidates arrays of earlier records.

        Raises:
            StreamLimit: One element is larger than all limits allow.
        """
        self._drop_rest()
        return self._buffer.free_view()

    def received(self, count: int) -> None:
        """Account for bytes written into :meth:`receive_view`."""
        self._quiet = False
        self._buffer.added(count)

    def pending(self) -> bytes:
        """A copy of what has arrived and is not decoded: the beginning of an element."""
        return self._buffer.peek(len(self._buffer))

    def pass_over(self, count: int) -> None:
        """Go on ``count`` bytes behind the cursor.

        For PAGE|CONTINUE records of the current block that were received straight into
        guest memory and checked there; what is pending is part of them.
        """
        self._buffer.pass_over(count)

    def feed(self, data: bytes | memoryview) -> None:
        """Append a copy of ``data``; invalidates arrays of earlier records.

        Raises:
            StreamLimit: One element is larger than all limits allow.
        """
        self._drop_rest()
        self._quiet = False
        self._buffer.feed(data)

    def feed_eof(self) -> None:
        """Say that no more input comes."""
        self._buffer.is_ended = True

    def idle(self) -> None:
        """Say that nothing came for a while.

        An EOF byte with nothing behind it then is the end: machine types that suppress the
        VMDESCRIPTION end so. A device section whose end was not found is looked at again.
        """
        self._quiet = True

    def next_record(self) -> Record | None:
        """Decode the next record.

        Returns:
            The record, or None when more input is needed or the stream is finished.

        Raises:
            StreamError: With position, section and block; the same one from then on.
        """
        if self._error is not None:
            raise self._error
        try:
            while not self._ready:
                if self._state is _State.FINISHED:
                    return None
                record = _STEPS[self._state](self)
                if record is not None:
                    return record
        except NeedData:
            if not self._buffer.is_ended:
                return None
            self._error = StreamTruncated(
                "the input ended before the end of the stream",
                position=self.position + len(self._buffer),
                section=self.section,
            )
            raise self._error from None
        except StreamError as error:
            self._error = error
            raise
        return self._ready.popleft()

    def _header(self) -> Record:
        record = decode_file_header(self._buffer)
        self._state = _State.CONFIGURATION
        return record

    def _configure(self) -> Record | None:
        if self._buffer.uint(1) != QEMU_VM_CONFIGURATION:
            self._state = _State.ELEMENT
            return None
        self._configuration = configuration = decode_configuration(self._buffer)
        if configuration.target_page_bits is not None:
            self._page_size = 1 << configuration.target_page_bits
        self._state = _State.ELEMENT
        return configuration

    def _element(self) -> Record | None:
        buffer = self._buffer
        kind = buffer.uint(1)
        if kind == QEMU_VM_EOF:
            buffer.skip(1)
            self._state = _State.DESCRIPTION
            return None
        if kind != QEMU_VM_SECTION_FULL:
            self._ready += self._opaque_reader.release()
        if kind == QEMU_VM_COMMAND:
            self._ready.append(self._command())
            return None
        if QEMU_VM_SECTION_START <= kind <= QEMU_VM_SECTION_FULL:
            return self._begin_section()
        raise StreamCorrupt(f"unknown element type {kind:#04x}", position=self.position)

    def _command(self) -> Command:
        position = self.position
        command = decode_command(self._buffer)
        if command.number == MIG_CMD_POSTCOPY_ADVISE:
            self._page_sizes = int.from_bytes(command.payload[:8], "big")
        if command.number == MIG_CMD_PACKAGED:
            self._package_bytes = int.from_bytes(command.payload, "big")
            if self._package_bytes > self._limits.package_bytes:
                raise StreamLimit(
                    f"a package of {self._package_bytes} bytes, the limit is "
                    f"{self._limits.package_bytes}",
                    position=position,
                )
            self._is_postcopy = True
            self._state = _State.PACKAGE
        return command

    def _begin_section(self) -> Record | None:
        header, size = self._table.decode_header(self._buffer)
        self._table.bind(header, self._buffer)
        self._section = header
        if header.idstr == "ram" and header.kind != QEMU_VM_SECTION_FULL:
            self._begin_ram(header)
            self._buffer.skip(size)
            self._state = _State.RAM_BODY
            self._ready.append(header)
            return None
        self._opaque_reader.begin(header, size)
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
        if "mapped-ram" in capabilities:
            raise StreamUnsupported(
                "a mapped-ram file is no stream",
                position=self.position,
                section="ram",
                hint="open it as a file at rest",
            )
        self._ram = RamDecoder(
            self._page_size,
            ram_limit_bytes=self._limits.ram_bytes,
            block_limit=self._limits.ram_blocks,
            has_addresses="x-ignore-shared" in capabilities,
            page_sizes=self._page_sizes,
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

    def _opaque(self) -> Record | None:
        section = self._opaque_reader.read(
            has_footers=self._has_footers is not False, quiet=self._quiet
        )
        self._section = None
        self._state = _State.ELEMENT
        return section

    def _package(self) -> Record:
        position = self.position
        body = self._buffer.peek(self._package_bytes)
        record = decode_package(body, position=position, has_footers=self._has_footers is not False)
        self._buffer.skip(self._package_bytes)
        self._state = _State.ELEMENT
        return record

    def _description(self) -> Record | None:
        buffer = self._buffer
        if not len(buffer) and not self._is_postcopy and not (buffer.is_ended or self._quiet):
            raise NeedData
        if not len(buffer) or self._is_postcopy or buffer.uint(1) != QEMU_VM_VMDESCRIPTION:
            self._finish(self._opaque_reader.release())
            return None
        length = buffer.uint(4, 1)
        if length > self._limits.description_bytes:
            raise StreamLimit(
                f"a VMDESCRIPTION of {length} bytes, the limit is {self._limits.description_bytes}",
                position=self.position,
                section="VMDESCRIPTION",
            )
        description = buffer.peek(length, 5)
        sections = self._opaque_reader.settle(description)
        buffer.skip(5 + length)
        self._finish(sections, VmDescription(description))
        return None

    def _finish(
        self, sections: list[OpaqueSection], description: VmDescription | None = None
    ) -> None:
        self._ready += sections
        self._ready.append(EndOfStream())
        if description is not None:
            self._ready.append(description)
        self._end_position = self._buffer.position
        self._state = _State.FINISHED

    def _drop_rest(self) -> None:
        """Nothing behind the end is looked at."""
        if self._state is _State.FINISHED:
            self._buffer.skip(len(self._buffer))


_STEPS: dict[_State, Callable[[StreamDecoder], Record | None]] = {
    _State.HEADER: StreamDecoder._header,
    _State.CONFIGURATION: StreamDecoder._configure,
    _State.ELEMENT: StreamDecoder._element,
    _State.OPAQUE: StreamDecoder._opaque,
    _State.RAM_BODY: StreamDecoder._ram_body,
    _State.RAM_FOOTER: StreamDecoder._ram_footer,
    _State.PACKAGE: StreamDecoder._package,
    _State.DESCRIPTION: StreamDecoder._description,
}

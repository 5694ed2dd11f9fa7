"""Where a section ends that nobody here can decode: there is no length on the wire.

With footers: the body ends at ``7e`` + its own section id, provided that a plausible
element follows. Without: the VMDESCRIPTION at the very end tells the sizes.

Reference: stream format 7.6, where the method was checked against 4300 real sections.
"""

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.command import is_command
from migrationd.codec.constants import (
    QEMU_VM_COMMAND,
    QEMU_VM_EOF,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
    QEMU_VM_VMDESCRIPTION,
)
from migrationd.codec.section import SectionTable
from migrationd.codec.vmdescription import device_sizes
from migrationd.errors import StreamLimit, StreamTruncated

_SECTION_ID_LIMIT = 1 << 20
_FOOTER_BYTES = 5


class FooterFramer:
    """Finds the end of one opaque section body; remembers how far it has looked.

    Args:
        section_id: Id of the section.
        idstr: Its name, for errors.
        header_bytes: Length of its header; the body begins there.
        body_limit: Most bytes of a body.
    """

    def __init__(self, section_id: int, idstr: str, header_bytes: int, body_limit: int) -> None:
        self._pattern = bytes([QEMU_VM_SECTION_FOOTER]) + section_id.to_bytes(4, "big")
        self._idstr = idstr
        self._header_bytes = header_bytes
        self._body_limit = body_limit
        self._scanned = header_bytes

    def body_length(self, buffer: ReadBuffer, table: SectionTable, *, quiet: bool) -> int:
        """Length of the body, whose header is at the cursor.

        Args:
            buffer: Input; the cursor stays where it is.
            table: Known section ids, for the test of what follows.
            quiet: The input has ended or paused: an EOF byte with nothing behind it is
                the end of the stream.

        Raises:
            NeedData: More input is needed to tell.
            StreamLimit: The body exceeds the limit.
            StreamTruncated: The input ended.
        """
        while True:
            hit = buffer.data.find(self._pattern, buffer.start + self._scanned, buffer.end)
            if hit < 0:
                # The pattern may straddle the end of what is here.
                self._scanned = max(self._header_bytes, len(buffer) - _FOOTER_BYTES + 1)
                self._check_limit(buffer, len(buffer) - self._header_bytes)
                raise self._missing(buffer)
            offset = hit - buffer.start
            self._check_limit(buffer, offset - self._header_bytes)
            self._scanned = offset
            try:
                plausible = is_plausible(buffer, offset + _FOOTER_BYTES, table, quiet=quiet)
            except NeedData:
                raise self._missing(buffer) from None
            if plausible:
                return offset - self._header_bytes
            self._scanned = offset + 1

    def _check_limit(self, buffer: ReadBuffer, length: int) -> None:
        if length > self._body_limit:
            raise StreamLimit(
                f"no end of the section within {self._body_limit} bytes",
                position=buffer.position,
                section=self._idstr,
            )

    def _missing(self, buffer: ReadBuffer) -> Exception:
        if buffer.is_ended:
            return StreamTruncated(
                "the input ended inside a section", position=buffer.position, section=self._idstr
            )
        return NeedData()


def is_plausible(buffer: ReadBuffer, offset: int, table: SectionTable, *, quiet: bool) -> bool:
    """Whether an element may begin ``offset`` bytes after the cursor.

    Raises:
        NeedData: More input is needed to tell.
    """
    if len(buffer) == offset and buffer.is_ended:
        return True
    kind = buffer.uint(1, offset)
    if kind == QEMU_VM_EOF:
        return _is_end(buffer, offset + 1, quiet=quiet)
    if kind in (QEMU_VM_SECTION_START, QEMU_VM_SECTION_FULL):
        return _is_header(buffer, offset + 1)
    if kind in (QEMU_VM_SECTION_PART, QEMU_VM_SECTION_END):
        return buffer.uint(4, offset + 1) in table
    if kind == QEMU_VM_COMMAND:
        return is_command(buffer.uint(2, offset + 1), buffer.uint(2, offset + 3))
    return False


def frame_by_description(
    buffer: ReadBuffer, description_limit: int
) -> tuple[list[tuple[str, int, int]], int]:
    """Sizes of the device sections of a stream without footers.

    Everything up to the end of the stream must be in the buffer; the description is
    found from its end backwards.

    Returns:
        idstr, instance id and body size of each FULL section; and the offset, from the
        cursor, of the EOF byte.

    Raises:
        NeedData: The end is not here yet.
    """
    data = memoryview(buffer.data)[buffer.start : buffer.end]
    raw = bytes(data[-(description_limit + 6) :])
    start = raw.rfind(b"}") + 1
    if start != len(raw):
        raise NeedData
    at = len(raw)
    while (at := raw.rfind(b"\x00\x06", 0, at)) >= 0:
        size = int.from_bytes(raw[at + 2 : at + 6], "big")
        if at + 6 + size == len(raw) and raw[at + 6 : at + 7] == b"{":
            try:
                sizes = device_sizes(raw[at + 6 :])
            except ValueError:
                continue
            return sizes, len(data) - len(raw) + at
        at += 1
    raise NeedData


def _is_end(buffer: ReadBuffer, offset: int, *, quiet: bool) -> bool:
    if len(buffer) == offset:
        if quiet or buffer.is_ended:
            return True
        raise NeedData
    if buffer.uint(1, offset) != QEMU_VM_VMDESCRIPTION:
        return False
    return buffer.uint(1, offset + 5) == ord("{")


def _is_header(buffer: ReadBuffer, offset: int) -> bool:
    if buffer.uint(4, offset) >= _SECTION_ID_LIMIT:
        return False
    length = buffer.uint(1, offset + 4)
    if not length:
        return False
    name = buffer.peek(length, offset + 5)
    if not all(0x20 <= byte <= 0x7E for byte in name):
        return False
    buffer.require(8, offset + 5 + length)
    return True

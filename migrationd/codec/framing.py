"""Where a section ends that nobody here can decode: there is no length on the wire.

The body ends at ``7e`` + its own section id, provided that a plausible element
follows. Streams without footers: see ``codec/reframe.py``.

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
from migrationd.codec.live_body import Measure
from migrationd.codec.section import SectionTable
from migrationd.errors import StreamLimit

FOOTER_BYTES = 5
_SECTION_ID_LIMIT = 1 << 20


class SectionFramer:
    """Finds the end of one opaque section body; remembers how far it has looked.

    Args:
        section_id: Id of the section.
        idstr: Its name, for errors.
        header_bytes: Length of its header; the body begins there.
        body_limit: Most bytes of a body.
        measure: Measures the chunks of a body that delimits itself; None for any other.
    """

    def __init__(
        self,
        section_id: int,
        idstr: str,
        header_bytes: int,
        body_limit: int,
        measure: Measure | None = None,
    ) -> None:
        self._footer = bytes([QEMU_VM_SECTION_FOOTER]) + section_id.to_bytes(4, "big")
        self._idstr = idstr
        self._header_bytes = header_bytes
        self._body_limit = body_limit
        self._measure = measure
        self._scanned = header_bytes
        self._is_measured = False

    def measured_length(self, buffer: ReadBuffer) -> int:
        """Length of a body that delimits itself; its header is at the cursor.

        Raises:
            NeedData: It is not complete.
            StreamCorrupt: It contradicts its format.
            StreamLimit: It exceeds the limit.
        """
        assert self._measure is not None
        while not self._is_measured:
            self._scanned, self._is_measured = self._measure(buffer, self._scanned)
            self._check_limit(buffer, self._scanned - self._header_bytes)
        return self._scanned - self._header_bytes

    def body_length(self, buffer: ReadBuffer, table: SectionTable, *, quiet: bool) -> int:
        """Length of the body that ends at a footer; its header is at the cursor.

        Args:
            buffer: Input; the cursor stays where it is.
            table: Known section ids, for the test of what follows.
            quiet: The input has paused: an EOF byte with nothing behind it is the end of
                the stream.

        Raises:
            NeedData: More input is needed to tell.
            StreamLimit: The body exceeds the limit.
        """
        while True:
            hit = buffer.data.find(self._footer, buffer.start + self._scanned, buffer.end)
            if hit < 0:
                # A footer may straddle the end of what is here.
                self._scanned = max(self._header_bytes, len(buffer) - FOOTER_BYTES + 1)
                self._check_limit(buffer, len(buffer) - self._header_bytes)
                raise NeedData
            self._scanned = hit - buffer.start
            self._check_limit(buffer, self._scanned - self._header_bytes)
            if is_plausible(buffer, self._scanned + FOOTER_BYTES, table, quiet=quiet):
                return self._scanned - self._header_bytes
            self._scanned += 1

    def _check_limit(self, buffer: ReadBuffer, length: int) -> None:
        if length > self._body_limit:
            raise StreamLimit(
                f"no end of the section within {self._body_limit} bytes",
                position=buffer.position,
                section=self._idstr,
            )


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
        return table.is_live(buffer.uint(4, offset + 1))
    if kind == QEMU_VM_COMMAND:
        return is_command(buffer.uint(2, offset + 1), buffer.uint(2, offset + 3))
    return False


def _is_end(buffer: ReadBuffer, offset: int, *, quiet: bool) -> bool:
    if len(buffer) == offset:
        if quiet or buffer.is_ended:
            return True
        raise NeedData
    if buffer.uint(1, offset) != QEMU_VM_VMDESCRIPTION:
        return False
    return buffer.uint(4, offset + 1) > 0 and buffer.uint(1, offset + 5) == ord("{")


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

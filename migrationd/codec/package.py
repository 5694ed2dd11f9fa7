"""PACKAGED: a nested stream of commands and device sections, without head and end.

    LISTEN  { FULL section }*  { PING }*  RUN

Reference: stream format 4.5.
"""

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.command import decode_command
from migrationd.codec.constants import (
    MIG_CMD_PACKAGED,
    MIG_CMD_POSTCOPY_RUN,
    QEMU_VM_COMMAND,
    QEMU_VM_SECTION_FULL,
)
from migrationd.codec.opaque import OpaqueReader
from migrationd.codec.records import Command, Package, StreamRecord
from migrationd.codec.section import SectionTable
from migrationd.errors import StreamCorrupt, StreamTruncated


def decode_package(body: bytes, *, position: int, has_footers: bool) -> Package:
    """Decode the bytes of a package, all of which have arrived.

    Args:
        body: The package.
        position: Stream position of its first byte, for errors.
        has_footers: Whether sections of this stream end with a footer.

    Raises:
        StreamError: With position and section.
    """
    buffer = ReadBuffer(len(body), len(body), position)
    buffer.feed(body)
    buffer.is_ended = True
    table = SectionTable()
    opaque = OpaqueReader(buffer, table, section_limit=len(body), description_limit=0)
    records: list[StreamRecord] = []
    try:
        while len(buffer):
            kind = buffer.uint(1)
            if kind == QEMU_VM_COMMAND:
                records += opaque.release()
                records.append(_command(buffer))
            elif kind == QEMU_VM_SECTION_FULL:
                header, size = table.decode_header(buffer)
                opaque.begin(header, size)
                opaque.read(has_footers=has_footers, quiet=False)
            else:
                raise StreamCorrupt(
                    f"element type {kind:#04x} in a package", position=buffer.position
                )
    except NeedData:
        raise StreamTruncated("the package ends early", position=buffer.position) from None
    last = records[-1] if records else None
    if not isinstance(last, Command) or last.number != MIG_CMD_POSTCOPY_RUN:
        raise StreamCorrupt("the package does not end with RUN", position=buffer.position)
    return Package(tuple(records))


def _command(buffer: ReadBuffer) -> Command:
    position = buffer.position
    command = decode_command(buffer)
    if command.number == MIG_CMD_PACKAGED:
        raise StreamCorrupt("a package in a package", position=position)
    return command

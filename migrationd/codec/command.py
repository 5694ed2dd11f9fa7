"""COMMAND: ``08  be16 number  be16 length  payload``.

Reference: stream format 4. Lengths are exact; an unknown command is fatal for a
destination.
"""

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.constants import (
    MIG_CMD_ENABLE_COLO,
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PACKAGED,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_POSTCOPY_LISTEN,
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    MIG_CMD_POSTCOPY_RESUME,
    MIG_CMD_POSTCOPY_RUN,
    MIG_CMD_RECV_BITMAP,
    MIG_CMD_SWITCHOVER_START,
    QEMU_VM_COMMAND,
)
from migrationd.codec.records import Command
from migrationd.errors import StreamCorrupt

_LENGTHS: dict[int, range] = {
    MIG_CMD_OPEN_RETURN_PATH: range(1),
    MIG_CMD_PING: range(4, 5),
    MIG_CMD_POSTCOPY_ADVISE: range(0, 17, 16),
    MIG_CMD_POSTCOPY_LISTEN: range(1),
    MIG_CMD_POSTCOPY_RUN: range(1),
    MIG_CMD_POSTCOPY_RAM_DISCARD: range(20, 0x10000),
    MIG_CMD_PACKAGED: range(4, 5),
    MIG_CMD_ENABLE_COLO: range(1),
    MIG_CMD_POSTCOPY_RESUME: range(1),
    MIG_CMD_RECV_BITMAP: range(2, 258),
    MIG_CMD_SWITCHOVER_START: range(1),
}


def is_command(number: int, length: int) -> bool:
    """Whether a known command may have this length."""
    return length in _LENGTHS.get(number, ())


def decode_command(buffer: ReadBuffer) -> Command:
    """Decode the command at the cursor.

    Raises:
        NeedData: It is not complete.
        StreamCorrupt: Unknown, or its length is wrong.
    """
    number = buffer.uint(2, 1)
    length = buffer.uint(2, 3)
    if number not in _LENGTHS:
        raise StreamCorrupt(f"unknown command {number}", position=buffer.position)
    if not is_command(number, length):
        raise StreamCorrupt(
            f"command {number} has a payload of {length} bytes", position=buffer.position
        )
    payload = buffer.peek(length, 5)
    buffer.skip(5 + length)
    return Command(number, payload)


def encode_command(command: Command) -> bytes:
    """Encode a command with its type byte."""
    return (
        bytes([QEMU_VM_COMMAND])
        + command.number.to_bytes(2, "big")
        + len(command.payload).to_bytes(2, "big")
        + command.payload
    )

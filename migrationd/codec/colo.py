"""Messages of a COLO checkpoint: bare numbers on the main connection, in both directions.

Behind the description of an ordinary stream, whose guest does not leave:

    secondary  READY
    primary    REQUEST                                      begins a checkpoint
    secondary  REPLY
    primary    VMSTATE_SEND  { RAM sections } EOF           guest stands still from here
    primary    VMSTATE_SIZE  be64 n, n bytes: { FULL sections } EOF
    secondary  VMSTATE_RECEIVED
    secondary  VMSTATE_LOADED                               guest may go on

Reference: stream format 6.8.
"""

from enum import IntEnum

MESSAGE_BYTES = 4
SIZE_BYTES = 8


class ColoMessage(IntEnum):
    """What a number means."""

    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6


def encode_message(message: ColoMessage) -> bytes:
    """A message without a value."""
    return message.to_bytes(MESSAGE_BYTES, "big")


def encode_size(size: int) -> bytes:
    """VMSTATE_SIZE with its value."""
    return encode_message(ColoMessage.VMSTATE_SIZE) + size.to_bytes(SIZE_BYTES, "big")


def name_of(number: int) -> str:
    """How a received number is called in messages."""
    return ColoMessage(number).name if number in ColoMessage.__members__.values() else str(number)

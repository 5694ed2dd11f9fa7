"""Messages from the destination to the source.

    be16 type  be16 length  payload
    RECV_BITMAP is followed, outside its length, by: be64 n  n bytes  be64 end mark

Reference: stream format 5. The message *with* the block name is 3, the one
without is 4.
"""

import struct
from dataclasses import dataclass

from migrationd.codec.constants import (
    MIG_RP_MAX_LENGTH,
    MIG_RP_MSG_PONG,
    MIG_RP_MSG_RECV_BITMAP,
    MIG_RP_MSG_REQ_PAGES,
    MIG_RP_MSG_REQ_PAGES_ID,
    MIG_RP_MSG_RESUME_ACK,
    MIG_RP_MSG_SHUT,
    MIG_RP_MSG_SWITCHOVER_ACK,
    RECV_BITMAP_END_MARK,
)
from migrationd.codec.header import encode_cstr8
from migrationd.errors import StreamCorrupt


@dataclass(frozen=True, slots=True)
class Shut:
    """The last message: 0 after success."""

    value: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to a PING with its value."""

    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """A page request; ``idstr`` is None for "the block of the previous request"."""

    start: int
    length: int
    idstr: str | None = None


@dataclass(frozen=True, slots=True)
class RecvBitmap:
    """Received pages of a block, bit *i* = byte i/8, bit i%8."""

    idstr: str
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """The destination is ready to go on."""

    value: int


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination is ready for the switchover."""


ReturnPathMessage = Shut | Pong | RequestPages | RecvBitmap | ResumeAck | SwitchoverAck

_FIXED = {
    MIG_RP_MSG_SHUT: 4,
    MIG_RP_MSG_PONG: 4,
    MIG_RP_MSG_REQ_PAGES: 12,
    MIG_RP_MSG_RESUME_ACK: 4,
    MIG_RP_MSG_SWITCHOVER_ACK: 0,
}


_FRAME = struct.Struct(">HH")
_REQUEST = struct.Struct(">QI")
_REQUEST_HEAD = _FRAME.pack(MIG_RP_MSG_REQ_PAGES, _REQUEST.size)
_REQUEST_BYTES = _FRAME.size + _REQUEST.size


def encode_request(start: int, length: int) -> bytes:
    """Encode a request for pages of the block of the previous request."""
    return _REQUEST_HEAD + _REQUEST.pack(start, length)


def encode_return_path(message: ReturnPathMessage) -> bytes:
    """Encode one message."""
    match message:
        case Shut(value):
            return _frame(MIG_RP_MSG_SHUT, value.to_bytes(4, "big"))
        case Pong(value):
            return _frame(MIG_RP_MSG_PONG, value.to_bytes(4, "big"))
        case RequestPages(start, length, idstr):
            if idstr is None:
                return encode_request(start, length)
            payload = _REQUEST.pack(start, length) + encode_cstr8(idstr)
            return _frame(MIG_RP_MSG_REQ_PAGES_ID, payload)
        case RecvBitmap(idstr, bitmap):
            return (
                _frame(MIG_RP_MSG_RECV_BITMAP, encode_cstr8(idstr))
                + len(bitmap).to_bytes(8, "big")
                + bitmap
                + RECV_BITMAP_END_MARK.to_bytes(8, "big")
            )
        case ResumeAck(value):
            return _frame(MIG_RP_MSG_RESUME_ACK, value.to_bytes(4, "big"))
        case SwitchoverAck():
            return _frame(MIG_RP_MSG_SWITCHOVER_ACK, b"")


class ReturnPathDecoder:
    """Incremental decoder of a return path.

    Args:
        bitmap_limit_bytes: Largest received-page bitmap; none are taken by default, for
            they belong to a recovery only.
    """

    def __init__(self, bitmap_limit_bytes: int = 0) -> None:
        self._bitmap_limit_bytes = bitmap_limit_bytes
        self._data = bytearray()
        self._position = 0

    def feed(self, data: bytes) -> list[ReturnPathMessage]:
        """Add bytes.

        Returns:
            The messages that are complete now.

        Raises:
            StreamCorrupt: Unknown type, wrong length or wrong end mark.
        """
        if len(data) == _REQUEST_BYTES and data[: _FRAME.size] == _REQUEST_HEAD and not self._data:
            # What comes ten thousand times a second, alone in its packet.
            self._position += _REQUEST_BYTES
            start, length = _REQUEST.unpack_from(data, _FRAME.size)
            return [RequestPages(start, length)]
        self._data += data
        messages: list[ReturnPathMessage] = []
        done = 0
        while (found := self._decode_one(done)) is not None:
            message, size = found
            done += size
            self._position += size
            messages.append(message)
            if isinstance(message, Shut):
                break  # what follows is no message
        del self._data[:done]
        return messages

    @property
    def rest(self) -> bytes:
        """What came behind the last message."""
        return bytes(self._data)

    def _decode_one(self, at: int) -> tuple[ReturnPathMessage, int] | None:
        data = self._data
        if len(data) - at < 4:
            return None
        kind, length = _FRAME.unpack_from(data, at)
        if kind == MIG_RP_MSG_REQ_PAGES and length == _REQUEST.size:
            if len(data) - at < 4 + length:
                return None
            start, size = _REQUEST.unpack_from(data, at + 4)
            return RequestPages(start, size), 4 + length
        self._check_frame(kind, length)
        if len(data) - at < 4 + length:
            return None
        payload = bytes(data[at + 4 : at + 4 + length])
        if kind == MIG_RP_MSG_RECV_BITMAP:
            return self._decode_bitmap(payload, at)
        return self._decode_payload(kind, payload), 4 + length

    def _check_frame(self, kind: int, length: int) -> None:
        if kind not in _FIXED and kind not in (MIG_RP_MSG_REQ_PAGES_ID, MIG_RP_MSG_RECV_BITMAP):
            raise self._corrupt(f"unknown message type {kind}")
        smallest = 14 if kind == MIG_RP_MSG_REQ_PAGES_ID else 2
        if length > MIG_RP_MAX_LENGTH or (
            length != _FIXED[kind] if kind in _FIXED else length < smallest
        ):
            raise self._corrupt(f"message type {kind} of {length} bytes")

    def _decode_payload(self, kind: int, payload: bytes) -> ReturnPathMessage:
        number = int.from_bytes(payload[:4], "big")
        if kind == MIG_RP_MSG_SHUT:
            return Shut(number)
        if kind == MIG_RP_MSG_PONG:
            return Pong(number)
        if kind == MIG_RP_MSG_RESUME_ACK:
            return ResumeAck(number)
        if kind == MIG_RP_MSG_SWITCHOVER_ACK:
            return SwitchoverAck()
        start, length = _REQUEST.unpack_from(payload)
        return RequestPages(start, length, self._name(payload[_REQUEST.size :]))

    def _decode_bitmap(self, payload: bytes, begin: int) -> tuple[ReturnPathMessage, int] | None:
        data = self._data
        at = begin + 4 + len(payload)
        if len(data) < at + 8:
            return None
        size = int.from_bytes(data[at : at + 8], "big")
        if size % 8 or size > self._bitmap_limit_bytes:
            raise self._corrupt(f"received-page bitmap of {size} bytes")
        at += 8
        if len(data) < at + size + 8:
            return None
        mark = int.from_bytes(data[at + size : at + size + 8], "big")
        if mark != RECV_BITMAP_END_MARK:
            raise self._corrupt(f"received-page bitmap ends with {mark:#x}")
        bitmap = bytes(data[at : at + size])
        return RecvBitmap(self._name(payload), bitmap), at + size + 8 - begin

    def _name(self, raw: bytes) -> str:
        if raw[0] != len(raw) - 1:
            raise self._corrupt(f"block name of {raw[0]} bytes in {len(raw) - 1}")
        return raw[1:].decode("latin-1")

    def _corrupt(self, message: str) -> StreamCorrupt:
        return StreamCorrupt(message, position=self._position, section="return path")


def _frame(kind: int, payload: bytes) -> bytes:
    return _FRAME.pack(kind, len(payload)) + payload

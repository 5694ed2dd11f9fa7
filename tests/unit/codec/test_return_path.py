"""Messages from the destination to the source."""

import pytest

from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathMessage,
    Shut,
    SwitchoverAck,
    encode_return_path,
)
from migrationd.errors import StreamCorrupt

WIRE: list[tuple[ReturnPathMessage, str]] = [
    (Shut(0), "0001 0004 00000000"),
    (Pong(0x42), "0002 0004 00000042"),
    (RequestPages(0x3000, 0x1000, "pc.ram"), "0003 0013 0000000000003000 00001000 06 70632e72616d"),
    (RequestPages(0x4000, 0x1000), "0004 000c 0000000000004000 00001000"),
    (RecvBitmap("a", bytes(8)), "0005 0002 0161 0000000000000008" + "00" * 8 + "0123456789abcdef"),
    (ResumeAck(1), "0006 0004 00000001"),
    (SwitchoverAck(), "0007 0000"),
]


@pytest.mark.parametrize(("message", "wire"), WIRE)
def test_each_message(message: ReturnPathMessage, wire: str) -> None:
    raw = bytes.fromhex(wire)
    assert encode_return_path(message) == raw
    assert ReturnPathDecoder(64).feed(raw) == [message]


def test_in_pieces() -> None:
    decoder = ReturnPathDecoder(64)
    raw = b"".join(bytes.fromhex(wire) for _, wire in WIRE)
    found = [message for byte in raw for message in decoder.feed(bytes([byte]))]
    assert found == [message for message, _ in WIRE]


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("0000 0000", "unknown message type 0"),
        ("0008 0000", "unknown message type 8"),
        ("0001 0005", "type 1 of 5 bytes"),
        ("0007 0001", "type 7 of 1 bytes"),
        ("0003 000d", "type 3 of 13 bytes"),
        ("0003 0201", "type 3 of 513 bytes"),
        ("0003 000f 0000000000000000 00001000 05 6162", "block name of 5 bytes in 2"),
        ("0005 0002 0161 0000000000000048", "bitmap of 72 bytes"),
        ("0005 0002 0161 0000000000000007", "bitmap of 7 bytes"),
        ("0005 0002 0161 0000000000000000 0000000000000000", "ends with 0x0"),
    ],
)
def test_bad_messages(wire: str, message: str) -> None:
    with pytest.raises(StreamCorrupt, match=message) as caught:
        ReturnPathDecoder(64).feed(bytes.fromhex(wire))
    assert caught.value.section == "return path"


def test_bitmaps_are_not_taken_by_default() -> None:
    with pytest.raises(StreamCorrupt, match="bitmap of 8 bytes"):
        ReturnPathDecoder().feed(bytes.fromhex("0005 0002 0161 0000000000000008"))


def test_the_error_stands_at_the_message() -> None:
    decoder = ReturnPathDecoder()
    with pytest.raises(StreamCorrupt) as caught:
        decoder.feed(bytes.fromhex("0002 0004 00000001 0009 0000"))
    assert caught.value.position == 8

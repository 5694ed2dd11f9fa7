"""How much of the recorded streams is covered: ``python -m tests.conformance.report``."""

import sys
from collections import Counter
from contextlib import suppress
from enum import Enum

from migrationd.codec.colo import ColoMessage, encode_message
from migrationd.codec.cpr import FD_MARK, decode_cpr_state, encode_cpr_state
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.multifd import HELLO_BYTES, PacketDecoder, decode_hello, encode_hello
from migrationd.codec.return_path import ReturnPathDecoder, encode_return_path
from migrationd.codec.stream import StreamDecoder
from migrationd.codec.urgent import UrgentDecoder
from migrationd.errors import StreamTruncated
from tests.conformance.captures import Capture, all_captures
from tests.conformance.replay import PAGE_SIZE, Replay, records, replay


class Outcome(Enum):
    """What became of a stream."""

    IDENTICAL = "identical"
    ENDS_EARLY = "cut by the source: all records before the cut identical"
    COLO_TAIL = "COLO: identical up to the checkpoint messages"
    DECODED = "decoded to the last byte"
    WRONG = "WRONG"


LEFT = {"mapped-ram": "mapped-ram file: opened by the store (test_mapped_ram_captures.py)"}


def outcome(capture: Capture, found: Replay, data: bytes) -> Outcome:
    """Judge a replay of a main stream."""
    if found.error is None and found.encoded == data:
        return Outcome.IDENTICAL
    if not data.startswith(found.encoded):
        return Outcome.WRONG
    if isinstance(found.error, StreamTruncated) and not capture.is_complete:
        return Outcome.ENDS_EARLY
    if capture.is_colo and found.finished:
        return Outcome.COLO_TAIL
    return Outcome.WRONG


def judge(capture: Capture) -> str:
    """One line of the table for a capture."""
    kind = "mapped-ram" if capture.is_mapped_ram else capture.kind
    if kind in LEFT:
        return f"left: {LEFT[kind]}"
    data = capture.data()
    match kind:
        case "return path":
            messages = ReturnPathDecoder(bitmap_limit_bytes=1 << 20).feed(data)
            found = _same(b"".join(map(encode_return_path, messages)), data)
        case "cpr state":
            found = _same(FD_MARK.join(encode_cpr_state(decode_cpr_state(data))), data)
        case "multifd channel":
            found = multifd_channel(capture, data)
        case "preempt channel":
            found = preempt_channel(capture, data)
        case "recovery connection":
            found = _same(recovered(main_stream(capture), data), data)
        case "COLO return path":
            found = _same(colo_messages(data), data)
        case _:
            found = outcome(capture, replay(data), data)
    return f"{kind}: {found.value}"


def multifd_channel(capture: Capture, data: bytes) -> Outcome:
    """Hello, and packets to the last byte; what they carry is in test_multifd_captures.py."""
    parameters = capture.scenario.get("parameters") or {}
    hello = decode_hello(data[:HELLO_BYTES])
    if encode_hello(hello) != data[:HELLO_BYTES]:
        return Outcome.WRONG
    method = parameters.get("multifd_compression", "none")
    decoder = PacketDecoder(hello.channel, PAGE_SIZE, method)
    at = HELLO_BYTES
    while at < len(data):
        packet = decoder.decode(data[at : at + decoder.header_bytes])
        at += decoder.header_bytes + packet.data_bytes
    return Outcome.DECODED if at == len(data) else Outcome.WRONG


def preempt_channel(capture: Capture, data: bytes) -> Outcome:
    """Urgent pages to the last byte, of the blocks that the main stream names."""
    stream = StreamDecoder()
    for _ in records(stream, [main_stream(capture)]):
        pass
    decoder = UrgentDecoder(stream.blocks, PAGE_SIZE)
    room = len(decoder.free_view())
    for start in range(0, len(data), room):
        part = data[start : start + room]
        decoder.free_view()[: len(part)] = part
        decoder.received(len(part))
        decoder.done()
    decoder.ended()
    return Outcome.DECODED


def recovered(before: bytes, data: bytes) -> bytes:
    """Records of a connection after a pause, which goes on where the first one was, encoded."""
    decoder, encoder = StreamDecoder(), StreamEncoder()
    with suppress(StreamTruncated):
        for record in records(decoder, [before]):
            encoder.encode(record)
    return b"".join(map(encoder.encode, records(decoder.resumed(), [data])))


def colo_messages(data: bytes) -> bytes:
    """What the secondary of a COLO pair said, encoded again: a return path, then bare numbers."""
    begin = 0
    while int.from_bytes(data[begin : begin + 2], "big"):
        begin += 4 + int.from_bytes(data[begin + 2 : begin + 4], "big")
    encoded = b"".join(map(encode_return_path, ReturnPathDecoder().feed(data[:begin])))
    words = (int.from_bytes(data[at : at + 4], "big") for at in range(begin, len(data), 4))
    return encoded + b"".join(encode_message(ColoMessage(word)) for word in words)


def main_stream(capture: Capture) -> bytes:
    """The first connection of the migration that a capture belongs to."""
    first = next(c for c in all_captures() if c.scenario == capture.scenario)
    assert first.kind == "main stream"
    return first.data()


def _same(encoded: bytes, data: bytes) -> Outcome:
    return Outcome.IDENTICAL if encoded == data else Outcome.WRONG


def main() -> int:
    """Print the table; 1 if a stream is not what it should be."""
    lines = Counter((judge(capture), capture.version) for capture in all_captures())
    versions = sorted({version for _, version in lines}, key=lambda text: float(text))
    width = max(len(line) for line, _ in lines)
    rows = [" " * width + "".join(f"{version:>6}" for version in versions)]
    rows += [
        f"{line:{width}}" + "".join(f"{lines[line, version]:6}" for version in versions)
        for line in sorted({line for line, _ in lines})
    ]
    sys.stdout.write("\n".join(rows) + "\n")
    return int(any(Outcome.WRONG.value in line for line, _ in lines))


if __name__ == "__main__":
    sys.exit(main())

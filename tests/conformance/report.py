"""How much of the recorded streams is covered: ``python -m tests.conformance.report``."""

import sys
from collections import Counter
from enum import Enum

from migrationd.codec.cpr import FD_MARK, decode_cpr_state, encode_cpr_state
from migrationd.codec.return_path import ReturnPathDecoder, encode_return_path
from migrationd.errors import StreamTruncated
from tests.conformance.captures import Capture, all_captures
from tests.conformance.replay import Replay, replay


class Outcome(Enum):
    """What became of a stream."""

    IDENTICAL = "identical"
    ENDS_EARLY = "cut by the source: all records before the cut identical"
    COLO_TAIL = "COLO: identical up to the checkpoint messages"
    WRONG = "WRONG"


LEFT = {
    "multifd channel": "packets of a multifd channel",
    "preempt channel": "records of a preempt channel",
    "recovery connection": "a connection after a pause: continues the tables of the first one",
    "COLO return path": "checkpoint messages",
    "mapped-ram": "mapped-ram file: a file at rest, read by the store",
}


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
    if kind == "return path":
        messages = ReturnPathDecoder(bitmap_limit_bytes=1 << 20).feed(data)
        same = b"".join(map(encode_return_path, messages)) == data
        return f"return path: {(Outcome.IDENTICAL if same else Outcome.WRONG).value}"
    if kind == "cpr state":
        same = FD_MARK.join(encode_cpr_state(decode_cpr_state(data))) == data
        return f"cpr state: {(Outcome.IDENTICAL if same else Outcome.WRONG).value}"
    return f"main stream: {outcome(capture, replay(data), data).value}"


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

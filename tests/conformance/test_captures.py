"""Recorded QEMU streams decode to what the manifest says and encode to the same bytes."""

import hashlib
import random
from itertools import repeat

import pytest

from migrationd.codec.constants import QEMU_VM_SECTION_FULL
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.return_path import ReturnPathDecoder, encode_return_path
from migrationd.codec.stream import StreamDecoder
from migrationd.codec.vmdescription import device_sizes
from migrationd.errors import StreamTruncated, StreamUnsupported
from tests.conformance.captures import Capture, captures
from tests.conformance.replay import Replay, pieces, records, replay, steps
from tests.conformance.report import Outcome, judge, outcome

MAIN_STREAMS = captures("main stream")
PLAIN = [capture for capture in MAIN_STREAMS if not capture.is_mapped_ram]
WITHOUT_FOOTERS = {"100-nofooter-pc", "111-nofooter-pc", "72-nofooter-pc"}

# Small, and of every kind: what is cut and split at every place.
SPLIT = [
    capture
    for capture in PLAIN
    if capture.entry["size"] < 200_000
    and any(
        word in capture.name for word in ("nofooter", "noconfig", "2.2", "suppress", "multifd-none")
    )
]
MANY_SPLITS = [
    capture
    for capture in PLAIN
    if capture.version == "10.0"
    or any(word in capture.name for word in ("compress", "block", "precopy-rp"))
]


def ids(chosen: list[Capture]) -> list[str]:
    return [capture.name for capture in chosen]


@pytest.mark.parametrize("capture", PLAIN, ids=ids(PLAIN))
def test_decodes_and_encodes_to_the_same_bytes(capture: Capture) -> None:
    data = capture.data()
    found = replay(data)
    result = outcome(capture, found, data)
    if result is Outcome.ENDS_EARLY:
        assert isinstance(found.error, StreamTruncated)
        assert data.startswith(found.encoded)
    elif result is Outcome.COLO_TAIL:
        assert found.finished
        assert data.startswith(found.encoded)
    else:
        assert result is Outcome.IDENTICAL
        assert found.finished
        assert found.error is None
        assert found.encoded == data
    check_manifest(capture, found)


def check_manifest(capture: Capture, found: Replay) -> None:
    entry = capture.entry
    if "ram_records" in entry:
        assert dict(found.counts) == entry["ram_records"]
    if "ram_blocks" in entry:
        assert found.blocks == [tuple(block) for block in entry["ram_blocks"]]
    if found.finished and "full_sections" in entry:
        assert entry["full_sections"] == [
            [s.section_id, s.idstr, s.instance_id, s.version_id, len(s.body)]
            for s in found.sections
            if s.kind == QEMU_VM_SECTION_FULL
        ]
    if found.finished and found.description and not entry.get("packaged"):
        described = device_sizes(found.description)
        assert [(d.idstr, d.instance_id) for d in described] == [
            (s.idstr, s.instance_id) for s in found.sections if s.kind == QEMU_VM_SECTION_FULL
        ]


@pytest.mark.parametrize(
    "capture",
    [capture for capture in PLAIN if capture.oracle],
    ids=ids([capture for capture in PLAIN if capture.oracle]),
)
def test_memory_is_that_of_the_source(capture: Capture) -> None:
    oracle = capture.oracle
    assert oracle is not None
    memory = replay(capture.data()).memory[oracle["block"]]
    assert hashlib.sha256(memory[: oracle["length"]]).hexdigest() == oracle["sha256"]


@pytest.mark.parametrize("capture", SPLIT, ids=ids(SPLIT))
def test_one_byte_at_a_time_gives_the_same_records(capture: Capture) -> None:
    data = capture.data()
    # Byte by byte where it is dense; page contents in odd pieces.
    dense = [1] * 3000 + [997] * ((len(data) - 13_000) // 997) + [1] * 12_000
    assert steps(StreamDecoder(), pieces(data, dense)) == steps(StreamDecoder(), [data])


@pytest.mark.parametrize("capture", MANY_SPLITS, ids=ids(MANY_SPLITS))
def test_random_pieces_give_the_same_records(capture: Capture) -> None:
    data = capture.data()
    chance = random.Random(capture.name)
    sizes = (int(chance.paretovariate(0.4)) % 70_000 + 1 for _ in repeat(None))
    decoder = StreamDecoder(buffer_bytes=128 << 10)
    try:
        split = steps(decoder, pieces(data, sizes))
    except StreamTruncated:
        assert not capture.is_complete
        return
    assert split == steps(StreamDecoder(), [data])


@pytest.mark.parametrize("capture", SPLIT, ids=ids(SPLIT))
def test_a_cut_at_any_record_is_found(capture: Capture) -> None:
    data = capture.data()
    decoder, encoder = StreamDecoder(), StreamEncoder()
    bounds = [0]
    for record in records(decoder, [data]):
        bounds.append(bounds[-1] + len(encoder.encode(record)))
    end_of_stream = bounds[-1]
    for bound in bounds[::3]:
        for cut in (bound - 1, bound, bound + 1):
            if 0 <= cut < end_of_stream:
                check_cut(data[:cut], data)


def check_cut(part: bytes, whole: bytes) -> None:
    """A part is refused, unless it ends where a stream without a description may end."""
    found = replay(part)
    assert whole.startswith(found.encoded)
    if found.error is None:
        assert found.finished
        assert found.encoded == part
        assert part[-1] == 0
    else:
        assert isinstance(found.error, StreamTruncated)
        assert found.error.position is not None
        assert found.error.position <= len(part)


@pytest.mark.parametrize(
    "capture",
    [capture for capture in MAIN_STREAMS if capture.is_mapped_ram],
    ids=ids([capture for capture in MAIN_STREAMS if capture.is_mapped_ram]),
)
def test_mapped_ram_is_left_to_the_store(capture: Capture) -> None:
    with pytest.raises(StreamUnsupported, match="mapped-ram"):
        list(records(StreamDecoder(), [capture.data()]))


RETURN_PATHS = captures("return path")


@pytest.mark.parametrize("capture", RETURN_PATHS, ids=ids(RETURN_PATHS))
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_return_paths(capture: Capture, step: int) -> None:
    data = capture.data()
    decoder = ReturnPathDecoder(bitmap_limit_bytes=1 << 20)
    messages = [message for part in pieces(data, repeat(step)) for message in decoder.feed(part)]
    assert b"".join(map(encode_return_path, messages)) == data
    assert len(messages) == len(capture.entry["messages"])


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("multifd channel", Outcome.DECODED),
        ("preempt channel", Outcome.DECODED),
        ("recovery connection", Outcome.IDENTICAL),
        ("COLO return path", Outcome.IDENTICAL),
    ],
)
def test_the_other_connections_of_a_migration(kind: str, result: Outcome) -> None:
    found = captures(kind)
    assert {capture.version for capture in found} >= {"7.2", "11.1"}
    assert {judge(capture) for capture in found} == {f"{kind}: {result.value}"}

"""The state of cpr-transfer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.codec.cpr import (
    ENTRY_LIMIT,
    FD_MARK,
    CprEntry,
    CprState,
    decode_cpr_state,
    decode_workload_tail,
    encode_cpr_state,
    encode_workload_tail,
)
from migrationd.errors import (
    StreamCorrupt,
    StreamError,
    StreamLimit,
    StreamTruncated,
    StreamUnsupported,
)
from tests.conformance.captures import Capture, captures

STATES = captures("cpr state")
ENTRIES = st.builds(
    CprEntry,
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40),
    st.integers(-(1 << 31), (1 << 31) - 1),
)


def encoded(state: CprState) -> bytes:
    return FD_MARK.join(encode_cpr_state(state))


@pytest.mark.parametrize("capture", STATES, ids=[capture.name for capture in STATES])
def test_recorded_states(capture: Capture) -> None:
    data = capture.data()
    state = decode_cpr_state(data)
    assert encoded(state) == data
    blocks = {name for file in capture.scenario["files"] for name, _ in file.get("ram_blocks", ())}
    assert {entry.name for entry in state.entries} == blocks
    assert state.plain_tail == b""
    assert bool(state.tail) == (capture.version == "11.1")


def test_there_are_recorded_states() -> None:
    assert {capture.version for capture in STATES} == {"10.0", "11.1"}


@given(st.lists(ENTRIES, unique=True, max_size=20), st.binary(max_size=40))
def test_what_is_encoded_is_decoded(entries: list[CprEntry], body: bytes) -> None:
    state = CprState(tuple(entries), encode_workload_tail(body))
    assert len(encode_cpr_state(state)) == len(entries) + 1
    again = decode_cpr_state(encoded(state))
    assert again == state
    assert decode_workload_tail(again.tail) == body


def test_every_cut_is_noticed() -> None:
    data = encoded(CprState((CprEntry("a"), CprEntry("b", -1))))
    for size in range(len(data)):
        with pytest.raises(StreamTruncated) as caught:
            decode_cpr_state(data[:size])
        assert caught.value.position == size


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"QEVM\0\0\0\1\0", StreamCorrupt),
        (b"QCPR\0\0\0\2\0", StreamUnsupported),
        (b"QCPR\0\0\0\1\2", StreamCorrupt),
        (b"QCPR\0\0\0\1\1\xff\xff\xff\xffa", StreamCorrupt),
        (b"QCPR\0\0\0\1\1\0\0\0\1\0\0\0\0\0 \0", StreamCorrupt),
        (b"QCPR\0\0\0\1\1\0\0\0\2aa\0\0\0\0 \0", StreamCorrupt),
        (b"QCPR\0\0\0\1\1\0\0\0\2\n\0\0\0\0\0 \0", StreamCorrupt),
        (b"QCPR\0\0\0\1\1\0\0\0\2a\0\0\0\0\0!\0", StreamCorrupt),
        (b"QCPR\0\0\0\1\0\x07", StreamCorrupt),
        (encoded(CprState((CprEntry("a"), CprEntry("a")))), StreamCorrupt),
    ],
)
def test_what_is_wrong_is_refused(data: bytes, error: type[StreamError]) -> None:
    with pytest.raises(error):
        decode_cpr_state(data)


def test_too_many_descriptors_are_refused() -> None:
    state = CprState(tuple(CprEntry("a", number) for number in range(ENTRY_LIMIT + 1)))
    with pytest.raises(StreamLimit):
        decode_cpr_state(encoded(state))


@given(st.binary(max_size=80))
def test_noise_gives_an_error_of_ours(noise: bytes) -> None:
    for data in (noise, b"QCPR\0\0\0\1" + noise):
        try:
            state = decode_cpr_state(data)
        except StreamError:
            continue
        assert encoded(state) == data


@pytest.mark.parametrize("tail", [b"", b"\x05\x03abc", encode_workload_tail(b"abc")[:-1]])
def test_another_tail_is_none_of_ours(tail: bytes) -> None:
    assert decode_workload_tail(tail) is None

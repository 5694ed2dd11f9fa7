"""Any bytes give values or errors, in bounded memory, and the reader recovers."""

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from migrationd.qmp.json_reader import JsonError, JsonReader, JsonValue

# QEMU takes no Unicode noncharacters in strings.
CHARACTERS = st.characters(exclude_categories=("Cs",)).filter(
    lambda c: not (0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(CHARACTERS, max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(CHARACTERS, max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)
NOISE = st.lists(
    st.sampled_from(
        [
            b"{",
            b"}",
            b"[",
            b"]",
            b":",
            b",",
            b'"',
            b"'",
            b"\\",
            b"1",
            b"-",
            b".5",
            b"e9",
            b"true",
            b"nul",
            b" ",
            b"\n",
            b"\x01",
            b"\xff",
            b"\xc3",
            b"\\ud800",
            b"\\u00",
        ]
    )
    | st.binary(max_size=6),
    max_size=60,
).map(b"".join)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(
    values=st.lists(JSON.map(lambda v: {"v": v}), max_size=4), cuts=st.lists(st.integers(0, 999))
)
def test_what_a_library_writes_is_read_however_it_is_split(
    values: list[dict[str, object]], cuts: list[int]
) -> None:
    data = b" ".join(json.dumps(value).encode() for value in values)
    reader = JsonReader()
    found = [item for chunk in split(data, cuts) for item in reader.feed(chunk)]
    assert [item.value for item in found if isinstance(item, JsonValue)] == values
    assert len(found) == len(values)


@settings(max_examples=800, deadline=None)
@given(data=NOISE, cuts=st.lists(st.integers(0, 999), max_size=8))
def test_noise_gives_the_same_however_it_is_split_and_never_stops_the_reader(
    data: bytes, cuts: list[int]
) -> None:
    whole, pieces = JsonReader(), JsonReader()
    expected = whole.feed(data)
    found = [item for chunk in split(data, cuts) for item in pieces.feed(chunk)]
    assert [repr(item) for item in found] == [repr(item) for item in expected]
    assert all(isinstance(item, JsonValue | JsonError) for item in found)
    recovered = pieces.feed(b"\x01\n") + pieces.feed(b'{"execute": "stop"}')
    assert JsonValue({"execute": "stop"}) in recovered

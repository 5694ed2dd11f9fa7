"""Any bytes give values or errors, in bounded memory, and the reader recovers."""

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from migrationd.qmp.json_reader import JsonError, JsonReader, JsonValue
from tests.support.fuzzing import cases

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


@settings(max_examples=cases(400))
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


@settings(max_examples=cases(800))
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


class SlowReader(JsonReader):
    """Reads byte by byte whatever the input is."""

    def _read_plainly(self, data: bytes, start: int) -> int:
        return start


ALMOST_PLAIN = st.lists(
    st.sampled_from(
        [
            b'{"execute": "stop"}',
            b'{"execute": "x", "arguments": {"a": [1, -2, true, null], "b": {}}, "id": 7}',
            b'{"a": 1, "a": 2}',
            b'{"a": 1.5}',
            b'{"a": 0e1, "b": 01}',
            b'{"a": NaN}',
            b'{"a": 18446744073709551615}',
            b'{"a": -9223372036854775809}',
            b'{"a": "\\ud800"}',
            b'{"a": "\xc3\xa4"}',
            b"{'a': 1}",
            b'{"a": [' + b"[" * 70 + b"]" * 70 + b"]}",
            b'{"unfinished": [',
            b"12",
            b"\n",
            b" ",
            b"\x01\n",
            b"}",
        ]
    )
    | st.sampled_from([b"{", b"}", b'"', b",", b":", b"1", b"[", b"]"])
    | JSON.map(lambda value: json.dumps({"v": value}).encode()),
    max_size=12,
).map(b"".join)


@settings(max_examples=cases(1500))
@given(data=ALMOST_PLAIN, cuts=st.lists(st.integers(0, 999), max_size=4))
def test_the_quick_way_and_the_slow_way_find_the_same(data: bytes, cuts: list[int]) -> None:
    quick, slow = JsonReader(), SlowReader()
    for chunk in split(data, cuts):
        assert list(map(repr, quick.feed(chunk))) == list(map(repr, slow.feed(chunk)))
        assert quick.is_between_values == slow.is_between_values

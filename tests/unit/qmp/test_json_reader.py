"""The incremental JSON reader: values, errors, recovery and limits."""

import json

import pytest

from migrationd.qmp import json_reader
from migrationd.qmp.json_reader import JsonError, JsonReader, JsonValue


def read(*chunks: bytes) -> list[object]:
    """Values, and texts of errors, that chunks give."""
    reader = JsonReader()
    found: list[object] = []
    for chunk in chunks:
        found += [
            item.value if isinstance(item, JsonValue) else item.text for item in reader.feed(chunk)
        ]
    return found


def test_several_values_in_one_write_and_no_newline() -> None:
    assert read(b'{"a":1}{"b":[2,{"c":null}]} [true]') == [
        {"a": 1},
        {"b": [2, {"c": None}]},
        [True],
    ]


def test_one_value_in_many_writes() -> None:
    text = b'{"execute": "mig\\u0072ate", "id": [1, -2.5e3, "x\\n"]}'
    assert read(*(text[i : i + 1] for i in range(len(text)))) == [
        {"execute": "migrate", "id": [1, -2500.0, "x\n"]}
    ]


def test_single_quotes_and_surrogate_pairs() -> None:
    assert read(b"{'a': 'it\\'s', \"b\": \"\\ud83d\\ude00\"}") == [{"a": "it's", "b": "\U0001f600"}]


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"18446744073709551616", 2.0**64),
        (b"-0", 0),
        (b"1.0", 1.0),
    ],
)
def test_numbers(number: bytes, value: object) -> None:
    (found,) = read(b"[" + number + b"]")
    assert found == [value]
    assert type(found[0]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"garbage\n", "1:1: JSON parse error, invalid keyword 'garbage'"),
        (b"\x01\n", "1:1: JSON parse error, stray '\x01'"),
        (b"}", "1:1: JSON parse error, expecting value"),
        (b"{]", "1:2: JSON parse error, expecting key"),
        (b"[}", "1:2: JSON parse error, expecting value"),
        (b'{"a": 1,}', "1:9: JSON parse error, expecting key"),
        (b'{"a" 1}', "1:6: JSON parse error, expecting ':'"),
        (b'{"a": 1 "b": 2}', "1:9: JSON parse error, expected ',' or '}'"),
        (b"[1 2]", "1:4: JSON parse error, expected ',' or ']'"),
        (b'{"a": 1, "a": 2}', "1:15: JSON parse error, duplicate key"),
        (b'["\\x"]', "1:2: JSON parse error, invalid escape sequence in string"),
        (b'["\\ud800"]', "1:2: JSON parse error, \\ud800 is not a valid Unicode character"),
        (b'["\xc3("]', "1:2: JSON parse error, invalid UTF-8 sequence in string"),
        (b'["\\ud83d\\u0041"]', "1:2: JSON parse error, \\ud83d is not a valid Unicode character"),
        (b'["\\u12"]', '1:2: JSON parse error, \\u12" is not a valid Unicode character'),
        (b'["\\uffff"]', "1:2: JSON parse error, \\uffff is not a valid Unicode character"),
        (b'["\xef\xbf\xbf"]', "1:2: JSON parse error, invalid UTF-8 sequence in string"),
        (b"01\n", "1:1: JSON parse error, stray '01'"),
        (b"01e5\n", "1:1: JSON parse error, stray '01'"),
        (b"1.}\n", "1:1: JSON parse error, stray '1.}'"),
        (b"- 1\n", "1:1: JSON parse error, stray '- '"),
        (b'"abc\n', "1:1: JSON parse error, stray '\"abc\n'"),
        (b'"ab\x00c"', "1:1: JSON parse error, stray '\"ab'"),
        (b"A", "1:1: JSON parse error, stray 'A'"),
    ],
)
def test_errors_in_the_words_of_qemu_11_1(text: bytes, error: str) -> None:
    assert read(text)[0] == error


def test_recovery_drops_up_to_a_control_character() -> None:
    assert read(b"\x01garbage true 12\n", b'{"a": 1}') == [
        "1:1: JSON parse error, stray '\x01'",
        {"a": 1},
    ]


def test_an_error_comes_as_soon_as_the_token_that_does_not_fit() -> None:
    assert read(b"{{") == ["1:2: JSON parse error, expecting key"]


def test_the_rest_of_a_refused_value_is_dropped_in_silence() -> None:
    refused = b'{"a" 1, [x], {"b": tru}} '
    assert read(refused, b"{}") == ["1:6: JSON parse error, expecting ':'", {}]


def test_a_malformed_token_ends_a_value_that_is_being_dropped() -> None:
    assert read(b"[1 2 A\n{}") == ["1:4: JSON parse error, expected ',' or ']'", {}]


def test_a_byte_that_ended_a_token_before_it_counts_twice() -> None:
    assert read(b"[1}") == ["1:4: JSON parse error, expected ',' or ']'"]
    assert read(b"true, ")[1] == "1:6: JSON parse error, expecting value"
    assert read(b"\x1b[A")[1] == "1:3: JSON parse error, stray 'A'"


def test_modified_utf8_for_nul() -> None:
    assert read(b'["\xc0\x80", "\\u0000"]') == [["\0", "\0"]]


def test_zero_takes_no_exponent() -> None:
    assert read(b"0e5 ") == [0, "1:3: JSON parse error, invalid keyword 'e'", 5]


def test_lines_are_counted_over_the_whole_connection() -> None:
    assert read(b"{}\n\n", b"\n  nil\n")[-1] == "4:3: JSON parse error, invalid keyword 'nil'"


def test_nesting_limit() -> None:
    deep = b"[" * 1024 + b"]" * 1024
    (value,) = read(deep)
    assert isinstance(value, list)
    too_deep = b"[" * 1025 + b"]" * 1025
    assert read(too_deep, b'{"a": 1}') == ["JSON nesting depth limit exceeded", {"a": 1}]


def test_token_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "TOKEN_COUNT_LIMIT", 10)
    assert read(b"[" + b"1," * 20 + b"1]", b"{}") == ["JSON token count limit exceeded", {}]
    monkeypatch.setattr(json_reader, "TOKEN_BYTES_LIMIT", 100)
    assert read(b'["' + b"x" * 200) == ["JSON token size limit exceeded"]
    strings = b'["' + b"x" * 40 + b'","' + b"x" * 40 + b'","' + b"x" * 40 + b'"]'
    assert read(strings, b"{}") == ["JSON token size limit exceeded", {}]


def test_every_byte_is_looked_at_once_however_small_the_pieces() -> None:
    reader = JsonReader()
    piece = b"x" * 1024
    assert reader.feed(b'{"a": "') == []
    for _ in range(16 << 10):
        assert reader.feed(piece) == []
    (value,) = reader.feed(b'"}')
    assert value == JsonValue({"a": "x" * (16 << 20)})


def test_whether_something_of_a_value_has_been_read() -> None:
    reader = JsonReader()
    for data, is_between in (
        (b"", True), (b" \n", True), (b"{", False), (b"}", True), (b"12", False), (b" ", True),
        (b"\x01", False), (b"\n", True),
    ):  # fmt: skip
        reader.feed(data)
        assert reader.is_between_values is is_between, data


def test_output_of_a_client_library_round_trips() -> None:
    value = {"execute": "x", "arguments": {"é": ["\u2028", 1e-7, {}, []]}, "id": None}
    assert read(json.dumps(value).encode()) == [value]
    assert isinstance(JsonReader().feed(b"}")[0], JsonError)

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
        (b"01\n", "1:1: JSON parse error, stray '01'"),
    ],
)
def test_errors_in_the_words_of_qemu_11_1(text: bytes, error: str) -> None:
    assert read(text)[0] == error


def test_recovery_drops_up_to_a_control_character() -> None:
    assert read(b"\x01garbage true 12\n", b'{"a": 1}') == [
        "1:1: JSON parse error, stray '\x01'",
        {"a": 1},
    ]


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


def test_output_of_a_client_library_round_trips() -> None:
    value = {"execute": "x", "arguments": {"é": ["\u2028", 1e-7, {}, []]}, "id": None}
    assert read(json.dumps(value).encode()) == [value]
    assert isinstance(JsonReader().feed(b"}")[0], JsonError)

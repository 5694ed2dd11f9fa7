"""Messages as QEMU writes them."""

import json

import pytest

from migrationd.qmp.message import Json, encode_message


def test_one_ascii_line_with_spaces_after_separators() -> None:
    message: dict[str, object] = {"return": {"a": [1, "é\U0001f600"], "b": None}, "id": 1.5}
    line = b'{"return": {"a": [1, "\\u00e9\\ud83d\\ude00"], "b": null}, "id": 1.5}\r\n'
    assert encode_message(message) == line


@pytest.mark.parametrize(
    "value",
    [{}, [], {"a": {}, "b": [{}, [1, [2, 3], 4], "x"], "c": None}, [[], [{}]], "text", True, -1],
)
def test_an_id_comes_back_as_it_was(value: object) -> None:
    line = encode_message({"return": {}, "id": value})
    assert line.decode().rstrip() == json.dumps({"return": {}, "id": value})


def test_an_id_may_be_as_deep_as_the_reader_takes() -> None:
    deep: object = 1
    for _ in range(1023):
        deep = [{"k": deep}]
    assert encode_message({"return": {}, "id": deep}).count(b"[") == 1023


def test_an_id_beyond_the_range_of_a_double_stays_json_with_the_same_value() -> None:
    line = encode_message({"id": {"x": [float("inf"), float("-inf")]}, "error": {}})
    assert json.loads(line)["id"] == {"x": [float("inf"), float("-inf")]}
    assert b"1e999, -1e999" in line


def test_what_is_encoded_already_goes_out_as_it_is() -> None:
    value = Json('[{"name": "1"}]')
    assert encode_message({"return": value}) == b'{"return": [{"name": "1"}]}\r\n'
    assert encode_message({"return": value, "id": 7}) == b'{"return": [{"name": "1"}], "id": 7}\r\n'
    pretty = encode_message({"return": value}, is_pretty=True)
    assert pretty == encode_message({"return": [{"name": "1"}]}, is_pretty=True)

"""The text of ``-object``: ``TYPE,id=ID,key=value`` or one JSON object.

In the first form a comma in a value is doubled, and ``rules.0.match=...`` makes lists.

Reference: QEMU's ``-object``.
"""

import json
import re

from migrationd.errors import ObjectError
from migrationd.objects.registry import ObjectRegistry

_FLAGS = ("verify-peer", "sanity-check")
_NUMBERS = (
    "aio-max-batch", "poll-grow", "poll-max-ns", "poll-shrink", "poll-weight", "thread-pool-max",
    "thread-pool-min",
)  # fmt: skip
_NAMES = frozenset(
    (
        *("data", "dir", "endpoint", "file", "format", "identity", "iv", "keyid", "passwordid"),
        *("policy", "priority", "rules", "username", *_FLAGS, *_NUMBERS),
    )
)
_RULE_NAMES = ("match", "policy", "format")
_RULE_KEY = re.compile(r"rules\.(0|[1-9][0-9]{0,3})\.([a-z]+)\Z")


def add_from_option(registry: ObjectRegistry, text: str) -> None:
    """Make the object that an ``-object`` asks for.

    Raises:
        ObjectError: The text or the object is wrong.
    """
    qom_type, object_id, values = parse_object(text)
    registry.add(qom_type, object_id, values)


def parse_object(text: str) -> tuple[str, str, dict[str, object]]:
    """Type, id and properties of the object that a text asks for.

    Raises:
        ObjectError: The text is wrong.
    """
    values = _from_json(text) if text.startswith("{") else _from_keys(text)
    qom_type, object_id = values.pop("qom-type", None), values.pop("id", None)
    for name, value in (("qom-type", qom_type), ("id", object_id)):
        if value is None:
            raise ObjectError(f"Parameter '{name}' is missing")
        if not isinstance(value, str):
            raise ObjectError(f"Invalid parameter type for '{name}', expected: string")
    for name, value in values.items():
        _check(name, value)
    return str(qom_type), str(object_id), values


def _check(name: str, value: object) -> None:
    if name not in _NAMES:
        raise ObjectError(f"Parameter '{name}' is unexpected")
    kind: type = str
    expected = "string"
    if name in _FLAGS:
        kind, expected = bool, "boolean"
    elif name in _NUMBERS:
        kind, expected = int, "integer"
    elif name == "rules":
        kind, expected = list, "array"
    if not isinstance(value, kind):
        raise ObjectError(f"Invalid parameter type for '{name}', expected: {expected}")


def _from_json(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ObjectError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ObjectError("expected a JSON object")
    return values


def _from_keys(text: str) -> dict[str, object]:
    values: dict[str, object] = {}
    rules: dict[int, dict[str, object]] = {}
    for number, word in enumerate(_split(text)):
        key, equals, value = word.partition("=")
        if not equals:
            if number:
                raise ObjectError(f"Expected '=' after parameter '{key}'")
            key, value = "qom-type", word
        match = _RULE_KEY.match(key)
        if match and match[2] in _RULE_NAMES:
            rules.setdefault(int(match[1]), {})[match[2]] = value
        elif key in _FLAGS:
            values[key] = _flag(key, value)
        elif key in _NUMBERS:
            values[key] = _number(key, value)
        else:
            values[key] = value
    if rules:
        if sorted(rules) != list(range(len(rules))):
            raise ObjectError("Parameter 'rules' has a gap in its numbers")
        values["rules"] = [rules[number] for number in range(len(rules))]
    return values


def _split(text: str) -> list[str]:
    """Words between single commas; a doubled one stands for itself.

    >>> _split("a,b=c,,d,e=f")
    ['a', 'b=c,d', 'e=f']
    """
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text):
        raise ObjectError(f"Parameter '{name}' expects integer")
    return int(text)


def _flag(name: str, text: str) -> bool:
    if text not in ("on", "off", "yes", "no", "true", "false", "y", "n"):
        raise ObjectError(f"Parameter '{name}' expects 'on' or 'off'")
    return text in ("on", "yes", "true", "y")

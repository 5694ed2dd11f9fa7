"""Objects to bytes, as QEMU writes them: ASCII, a space after ``:`` and ``,``, CR LF."""

import json
import math


class Json:
    """A value that is JSON text already."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def encode_message(message: dict[str, object], *, is_pretty: bool = False) -> bytes:
    """One reply, event or greeting.

    Args:
        message: JSON value; only a client's ``id`` may be nested deeply.
        is_pretty: Spread it over indented lines, as ``-qmp-pretty`` does.

    Returns:
        One line, or several.
    """
    encoded = message.get("return")
    if is_pretty:
        if isinstance(encoded, Json):
            message = message | {"return": json.loads(encoded.text)}
        return _encode_any(message, indent="\r\n").encode() + b"\r\n"
    has_plain_id = "id" not in message or isinstance(message["id"], str | int)
    if has_plain_id and not isinstance(encoded, Json):
        return _encode(message).encode() + b"\r\n"
    members = ", ".join(
        f"{json.dumps(name)}: {_encode_any(value) if name == 'id' else _encode(value)}"
        for name, value in message.items()
    )
    return b"{" + members.encode() + b"}\r\n"


_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False)
_STEP = " " * 4


def _encode(value: object) -> str:
    if isinstance(value, Json):
        return value.text
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _encode_any(value)


def _encode_any(root: object, indent: str = "") -> str:
    """Encode without recursion: a client's ``id`` may be nested as deeply as the reader takes.

    Numbers beyond a double's range are written so that they are read back as they came,
    where QEMU writes ``inf``, which is not JSON.

    Args:
        root: The value.
        indent: What a new line begins with, for the form of several lines; empty brackets
            are two lines there, as in QEMU.
    """
    out: list[str] = []
    todo: list[tuple[str, object, str]] = [("", root, indent)]
    while todo:
        before, item, start = todo.pop()
        out.append(before)
        inner = start + _STEP if start else ""
        if item is _NOTHING:
            continue
        if isinstance(item, dict):
            out.append("{")
            todo.append((start + "}", _NOTHING, ""))
            comma = "," if start else ", "
            members = [
                ((comma if number else "") + f"{inner}{json.dumps(key)}: ", value, inner)
                for number, (key, value) in enumerate(item.items())
            ]
            todo += reversed(members)
        elif isinstance(item, list | tuple):
            out.append("[")
            todo.append((start + "]", _NOTHING, ""))
            comma = "," if start else ", "
            entries = [
                ((comma if number else "") + inner, value, inner)
                for number, value in enumerate(item)
            ]
            todo += reversed(entries)
        elif isinstance(item, float) and not math.isfinite(item):
            out.append("null" if math.isnan(item) else "1e999" if item > 0 else "-1e999")
        else:
            out.append(json.dumps(item))
    return "".join(out)


_NOTHING = object()
"""Only the text in front of it."""

"""Objects to bytes, as QEMU writes them: ASCII, a space after ``:`` and ``,``, CR LF."""

import json
import math


def encode_message(message: dict[str, object]) -> bytes:
    """One reply, event or greeting.

    Args:
        message: JSON value; only a client's ``id`` may be nested deeply.

    Returns:
        One line.
    """
    members = ", ".join(
        f"{json.dumps(name)}: {_encode_any(value) if name == 'id' else _encode(value)}"
        for name, value in message.items()
    )
    return b"{" + members.encode() + b"}\r\n"


def _encode(value: object) -> str:
    try:
        return json.dumps(value, separators=(", ", ": "), allow_nan=False)
    except ValueError:
        return _encode_any(value)


def _encode_any(root: object) -> str:
    """Encode without recursion: a client's ``id`` may be nested as deeply as the reader takes.

    Numbers beyond a double's range are written so that they are read back as they came,
    where QEMU writes ``inf``, which is not JSON.
    """
    out: list[str] = []
    todo: list[object] = [root]
    while todo:
        item = todo.pop()
        if isinstance(item, _Text):
            out.append(item.text)
        elif isinstance(item, dict):
            out.append("{")
            todo.append(_END_OBJECT)
            for number, (key, value) in enumerate(reversed(item.items())):
                comma = ", " if number < len(item) - 1 else ""
                todo += (value, _Text(f"{comma}{json.dumps(key)}: "))
        elif isinstance(item, list):
            out.append("[")
            todo.append(_END_LIST)
            for number, value in enumerate(reversed(item)):
                todo.append(value)
                if number < len(item) - 1:
                    todo.append(_COMMA)
        elif isinstance(item, float) and not math.isfinite(item):
            out.append("null" if math.isnan(item) else "1e999" if item > 0 else "-1e999")
        else:
            out.append(json.dumps(item))
    return "".join(out)


class _Text:
    """Encoded already."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_COMMA = _Text(", ")
_END_OBJECT = _Text("}")
_END_LIST = _Text("]")

"""Tokens to a JSON value, without recursion; texts as in QEMU 11.1."""

import re
from dataclasses import dataclass

_INT_MIN = -(1 << 63)
_UINT_MAX = (1 << 64) - 1
_SIMPLE = {
    ord("b"): "\b", ord("f"): "\f", ord("n"): "\n", ord("r"): "\r", ord("t"): "\t",
    ord("/"): "/", ord("\\"): "\\", ord('"'): '"', ord("'"): "'",
}  # fmt: skip
_HEX4 = re.compile(rb"[0-9a-fA-F]{4}")
_KEYWORDS: dict[bytes, object] = {b"true": True, b"false": False, b"null": None}


@dataclass(frozen=True, slots=True)
class Token:
    """Raw bytes and where they began."""

    raw: bytes
    line: int
    column: int


class JsonSyntaxError(Exception):
    """The tokens are no JSON value."""

    def __init__(self, token: Token, text: str) -> None:
        super().__init__(text)
        self.token = token
        self.text = text


class _Object(dict[str, object]):
    """An object under construction, with the key that waits for its value."""

    key: str | None = None


def parse_tokens(tokens: list[Token]) -> object:
    """Parse the tokens of one value, whose brackets balance or fail to.

    Raises:
        JsonSyntaxError: With the token that does not fit.
    """
    stack: list[_Object | list[object]] = []
    expects = "value"
    for token in tokens:
        kind = token.raw[:1]
        top = stack[-1] if stack else None
        if expects == "key" or expects == "key or end":
            assert isinstance(top, _Object)
            if kind == b"}" and expects == "key or end":
                done: object = stack.pop()
            elif kind in (b'"', b"'"):
                top.key = _string(token)
                expects = "colon"
                continue
            else:
                raise JsonSyntaxError(token, "expecting key")
        elif expects == "colon":
            if kind != b":":
                raise JsonSyntaxError(token, "expecting ':'")
            expects = "value"
            continue
        elif expects == "separator":
            closing = b"}" if isinstance(top, _Object) else b"]"
            if kind == b",":
                expects = "key" if isinstance(top, _Object) else "value"
                continue
            if kind != closing:
                raise JsonSyntaxError(token, f"expected ',' or '{closing.decode()}'")
            done = stack.pop()
        elif kind == b"{":
            stack.append(_Object())
            expects = "key or end"
            continue
        elif kind == b"[":
            stack.append([])
            expects = "value or end"
            continue
        elif kind == b"]" and expects == "value or end":
            done = stack.pop()
        else:
            done = _scalar(token)
        if not stack:
            return done
        parent = stack[-1]
        if isinstance(parent, _Object):
            assert parent.key is not None
            if parent.key in parent:
                raise JsonSyntaxError(token, "duplicate key")
            parent[parent.key] = done
        else:
            parent.append(done)
        expects = "separator"
    raise JsonSyntaxError(tokens[-1], "premature end of input")


def _scalar(token: Token) -> object:
    raw = token.raw
    first = raw[:1]
    if first in (b'"', b"'"):
        return _string(token)
    if first.isdigit() or first == b"-":
        return _number(raw)
    if first.isalpha():
        if raw not in _KEYWORDS:
            raise JsonSyntaxError(token, f"invalid keyword '{raw.decode('ascii', 'replace')}'")
        return _KEYWORDS[raw]
    raise JsonSyntaxError(token, "expecting value")


def _number(raw: bytes) -> int | float:
    if raw.lstrip(b"-").isdigit() and len(raw) <= 20:
        value = int(raw)
        if _INT_MIN <= value <= _UINT_MAX:
            return value
    return float(raw)


def _string(token: Token) -> str:
    body = token.raw[1:-1]
    try:
        if b"\\" not in body:
            return body.decode("utf-8")
        return _unescape(token, body)
    except UnicodeDecodeError:
        raise JsonSyntaxError(token, "invalid UTF-8 sequence in string") from None


def _unescape(token: Token, body: bytes) -> str:
    out: list[str] = []
    at = 0
    while at < len(body):
        escape = body.find(b"\\", at)
        if escape < 0:
            out.append(body[at:].decode("utf-8"))
            break
        out.append(body[at:escape].decode("utf-8"))
        letter = body[escape + 1]
        at = escape + 2
        if letter in _SIMPLE:
            out.append(_SIMPLE[letter])
        elif letter == ord("u"):
            code, at = _code_point(token, body, at)
            out.append(chr(code))
        else:
            raise JsonSyntaxError(token, "invalid escape sequence in string")
    return "".join(out)


def _code_point(token: Token, body: bytes, at: int) -> tuple[int, int]:
    code = _hex4(token, body, at)
    end = at + 4
    if 0xD800 <= code < 0xDC00 and body[end : end + 2] == b"\\u":
        low = _hex4(token, body, end + 2)
        if 0xDC00 <= low < 0xE000:
            return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), end + 6
        text = body[at - 2 : end + 6].decode("ascii", "replace")
        raise JsonSyntaxError(token, f"{text} is not a valid Unicode character")
    if 0xD800 <= code < 0xE000:
        text = body[at - 2 : end].decode("ascii")
        raise JsonSyntaxError(token, f"{text} is not a valid Unicode character")
    return code, end


def _hex4(token: Token, body: bytes, at: int) -> int:
    match = _HEX4.match(body, at)
    if not match:
        shown = body[at : at + 4].decode("utf-8", "replace")
        raise JsonSyntaxError(token, f"invalid hex escape '\\u{shown}' in string")
    return int(match[0], 16)

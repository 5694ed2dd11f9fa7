"""Tokens to JSON values, one token at a time and without recursion; texts as in QEMU 11.1."""

import re

_INT_MIN = -(1 << 63)
_UINT_MAX = (1 << 64) - 1
_SIMPLE = {
    ord("b"): "\b", ord("f"): "\f", ord("n"): "\n", ord("r"): "\r", ord("t"): "\t",
    ord("/"): "/", ord("\\"): "\\", ord('"'): '"', ord("'"): "'",
}  # fmt: skip
_HEX4 = re.compile(rb"[0-9a-fA-F]{4}")
_KEYWORDS: dict[bytes, object] = {b"true": True, b"false": False, b"null": None}
_HEX_ESCAPE_BYTES = 6
_INTEGER_BYTES = 20
"""No integer that stays one is longer."""


class JsonSyntaxError(Exception):
    """A token does not continue the value."""


class _Missing:
    pass


MISSING = _Missing()
"""No value is complete yet."""


class _Object(dict[str, object]):
    """An object under construction, with the key that waits for its value."""

    key: str | None = None


class JsonParser:
    """Builds one value after the other."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what has been built."""
        self._stack: list[_Object | list[object]] = []
        self._expects = "value"

    def push(self, token: bytes) -> object:
        """Take the next token.

        Args:
            token: Its bytes; a string with its quotes.

        Returns:
            The value that it completes, or ``MISSING``.

        Raises:
            JsonSyntaxError: It does not fit; call ``reset`` before the next value.
        """
        kind = token[:1]
        match self._expects:
            case "key" | "key or end":
                return self._key(token, kind)
            case "colon":
                if kind != b":":
                    raise JsonSyntaxError("expecting ':'")
                self._expects = "value"
                return MISSING
            case "separator":
                return self._separator(kind)
        if kind == b"{":
            self._stack.append(_Object())
            self._expects = "key or end"
            return MISSING
        if kind == b"[":
            self._stack.append([])
            self._expects = "value or end"
            return MISSING
        if kind == b"]" and self._expects == "value or end":
            return self._complete(self._stack.pop())
        return self._complete(_scalar(token))

    def _key(self, token: bytes, kind: bytes) -> object:
        if kind == b"}" and self._expects == "key or end":
            return self._complete(self._stack.pop())
        if kind not in (b'"', b"'"):
            raise JsonSyntaxError("expecting key")
        top = self._stack[-1]
        assert isinstance(top, _Object)
        top.key = _string(token)
        self._expects = "colon"
        return MISSING

    def _separator(self, kind: bytes) -> object:
        in_object = isinstance(self._stack[-1], _Object)
        if kind == b",":
            self._expects = "key" if in_object else "value"
            return MISSING
        closing = b"}" if in_object else b"]"
        if kind != closing:
            raise JsonSyntaxError(f"expected ',' or '{closing.decode()}'")
        return self._complete(self._stack.pop())

    def _complete(self, value: object) -> object:
        if not self._stack:
            self._expects = "value"
            return value
        parent = self._stack[-1]
        if isinstance(parent, list):
            parent.append(value)
        else:
            assert parent.key is not None
            if parent.key in parent:
                raise JsonSyntaxError("duplicate key")
            parent[parent.key] = value
        self._expects = "separator"
        return MISSING


def _scalar(token: bytes) -> object:
    first = token[:1]
    if first in (b'"', b"'"):
        return _string(token)
    if first.isdigit() or first == b"-":
        return _number(token)
    if first.isalpha():
        if token not in _KEYWORDS:
            raise JsonSyntaxError(f"invalid keyword '{token.decode('ascii')}'")
        return _KEYWORDS[token]
    raise JsonSyntaxError("expecting value")


def _number(token: bytes) -> int | float:
    if len(token) <= _INTEGER_BYTES and token.lstrip(b"-").isdigit():
        value = int(token)
        if _INT_MIN <= value <= _UINT_MAX:
            return value
    return float(token)


def _string(token: bytes) -> str:
    body = token[1:-1]
    if b"\\" not in body:
        return _decode(body)
    out: list[str] = []
    at = 0
    while (escape := body.find(b"\\", at)) >= 0:
        out.append(_decode(body[at:escape]))
        letter = body[escape + 1]
        if letter in _SIMPLE:
            out.append(_SIMPLE[letter])
            at = escape + 2
        elif letter == ord("u"):
            code, at = _code_point(token, escape + 1)
            out.append(chr(code))
        else:
            raise JsonSyntaxError("invalid escape sequence in string")
    out.append(_decode(body[at:]))
    return "".join(out)


def _decode(raw: bytes) -> str:
    r"""UTF-8 with ``C0 80`` for NUL, and without noncharacters."""
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise JsonSyntaxError("invalid UTF-8 sequence in string") from None
    if not text.isascii() and any(map(_is_noncharacter, text)):
        raise JsonSyntaxError("invalid UTF-8 sequence in string")
    return text


def decode_leniently(raw: bytes) -> str:
    """For showing what cannot be read: U+FFFD in place of what is invalid."""
    text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8", "replace")
    if text.isascii():
        return text
    return "".join("\ufffd" if _is_noncharacter(item) else item for item in text)


def _is_noncharacter(character: str) -> bool:
    code = ord(character)
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def _code_point(token: bytes, at: int) -> tuple[int, int]:
    r"""The character of an escape whose backslash is at ``token[at]``.

    Returns:
        Its number, and the index in the string's body behind the escape.
    """
    code = _hex4(token, at + 2)
    end = at + _HEX_ESCAPE_BYTES
    if code is not None and 0xD800 <= code < 0xDC00 and token[end : end + 2] == b"\\u":
        low = _hex4(token, end + 2)
        if low is not None and 0xDC00 <= low < 0xE000:
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
            end += _HEX_ESCAPE_BYTES
    if code is None or 0xD800 <= code < 0xE000 or _is_noncharacter(chr(code)):
        shown = token[at:end].decode("utf-8", "replace")
        raise JsonSyntaxError(f"{shown} is not a valid Unicode character")
    return code, end - 1


def _hex4(token: bytes, at: int) -> int | None:
    match = _HEX4.match(token, at)
    return int(match[0], 16) if match else None

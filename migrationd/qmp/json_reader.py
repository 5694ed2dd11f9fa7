r"""An incremental JSON reader: values are found by bracket balance, not by lines.

Pure: bytes in, values and errors out. QMP clients send no newline, several values in
one write, and one value in many.

Reference: QEMU 11.1's reader: its limits, its recovery after an error, its texts with
``LINE:COLUMN:`` in front; single-quoted strings and ``\\'`` are accepted.
"""

import re
from dataclasses import dataclass

from migrationd.qmp.json_parser import JsonSyntaxError, Token, parse_tokens

TOKEN_BYTES_LIMIT = 64 << 20
TOKEN_COUNT_LIMIT = 2 << 20
NESTING_LIMIT = 1024

_SPACE = re.compile(rb"[ \t\r\n]+")
_STRUCTURE = frozenset(b"{}[]:,")
_STRING = {
    ord('"'): re.compile(rb'"(?:[^"\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"'(?:[^'\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+"),
}
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?")
_NUMBER_BYTES = re.compile(rb"[-+.0-9eE]*+")
_WORD = re.compile(rb"[a-z]++")
_RECOVERED = re.compile(rb"[][{}:,\x00-\x08\x0a-\x1f\xfe\xff]")


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A complete value."""

    value: object


@dataclass(frozen=True, slots=True)
class JsonError:
    """Why input was dropped; the text for the client."""

    text: str


class _Incomplete(Exception):
    pass


class JsonReader:
    """Reads one connection."""

    def __init__(self) -> None:
        self._data = b""
        self._line = 1
        self._column = 1
        self._recovering = False
        self._dropping = False
        self._reset()

    def feed(self, data: bytes) -> list[JsonValue | JsonError]:
        """Add bytes.

        Returns:
            Values and errors that are complete now, in order.
        """
        self._data += data
        found: list[JsonValue | JsonError] = []
        at = 0
        try:
            while at < len(self._data):
                at = self._step(at, found)
        except _Incomplete:
            pass
        self._data = self._data[at:]
        if len(self._data) > TOKEN_BYTES_LIMIT:
            self._data = b""
            self._fail(found, "JSON token size limit exceeded", recover=True)
        return found

    def _reset(self) -> None:
        self._tokens: list[Token] = []
        self._token_bytes = 0
        self._braces = 0
        self._brackets = 0

    def _step(self, at: int, found: list[JsonValue | JsonError]) -> int:
        """Lex one token; returns the index behind it."""
        data = self._data
        if self._recovering:
            match = _RECOVERED.search(data, at)
            end = match.start() if match else len(data)
            self._advance(data[at:end])
            if not match:
                return end
            # QEMU counts the byte that ends a recovery twice.
            self._recovering = False
            at = end
            if data[at] not in b"\n\r":
                self._column += 1
                end = self._token(at, found)
                self._column -= 1
                return end
            return at
        space = _SPACE.match(data, at)
        if space:
            self._advance(space[0])
            return space.end()
        return self._token(at, found)

    def _token(self, at: int, found: list[JsonValue | JsonError]) -> int:
        data = self._data
        first = data[at]
        if first in _STRUCTURE:
            end = at + 1
        elif first in _STRING:
            end = self._string_end(at)
        elif first in b"-0123456789":
            end = self._number_end(at)
        else:
            word = _WORD.match(data, at)
            if not word:
                return self._stray(at, at + 1, found)
            end = word.end()
            if end == len(data):
                raise _Incomplete
        if end < 0:
            return self._stray(at, -end, found)
        self._add(Token(data[at:end], self._line, self._column), found)
        self._advance(data[at:end])
        return end

    def _string_end(self, at: int) -> int:
        """Index behind a string; negative: index behind the byte that breaks it."""
        data = self._data
        match = _STRING[data[at]].match(data, at)
        assert match is not None
        end = match.end()
        if end == len(data) or (data[end] == ord("\\") and end + 1 == len(data)):
            raise _Incomplete
        if data[end] == data[at]:
            return end + 1
        return -(end + 2) if data[end] == ord("\\") else -(end + 1)

    def _number_end(self, at: int) -> int:
        data = self._data
        digits = _NUMBER_BYTES.match(data, at)
        assert digits is not None
        if digits.end() == len(data):
            raise _Incomplete
        match = _NUMBER.match(data, at)
        if match is None:
            return -(at + 2)
        end = match.end()
        if end == digits.end():
            return end
        # Malformed: leading zeros run on to the end of the digits, else one byte more.
        if data[at:end].lstrip(b"-") == b"0" and data[end : end + 1].isdigit():
            return -digits.end()
        return -min(digits.end() + 1, len(data))

    def _stray(self, at: int, end: int, found: list[JsonValue | JsonError]) -> int:
        raw = self._data[at:end]
        text = raw.decode("utf-8", "replace")
        self._fail(found, f"{self._line}:{self._column}: JSON parse error, stray '{text}'")
        self._advance(raw)
        self._recovering = not raw.endswith((b"\n", b"}", b"]"))
        return end

    def _fail(
        self, found: list[JsonValue | JsonError], text: str, *, recover: bool = False
    ) -> None:
        if not self._dropping:
            found.append(JsonError(text))
        self._reset()
        self._recovering = recover

    def _add(self, token: Token, found: list[JsonValue | JsonError]) -> None:
        kind = token.raw[:1]
        if self._dropping:
            self._count(kind)
            if self._braces <= 0 and self._brackets <= 0:
                self._dropping = False
                self._reset()
            return
        self._tokens.append(token)
        self._token_bytes += len(token.raw)
        self._count(kind)
        if self._token_bytes > TOKEN_BYTES_LIMIT:
            self._drop(found, "JSON token size limit exceeded")
        elif len(self._tokens) > TOKEN_COUNT_LIMIT:
            self._drop(found, "JSON token count limit exceeded")
        elif self._braces + self._brackets > NESTING_LIMIT:
            self._drop(found, "JSON nesting depth limit exceeded")
        elif self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
            self._parse(found)

    def _count(self, kind: bytes) -> None:
        if kind == b"{":
            self._braces += 1
        elif kind == b"}":
            self._braces -= 1
        elif kind == b"[":
            self._brackets += 1
        elif kind == b"]":
            self._brackets -= 1

    def _drop(self, found: list[JsonValue | JsonError], text: str) -> None:
        """Report a limit once and forget the rest of this value."""
        found.append(JsonError(text))
        self._tokens = []
        self._token_bytes = 0
        self._dropping = True

    def _parse(self, found: list[JsonValue | JsonError]) -> None:
        tokens = self._tokens
        self._reset()
        try:
            found.append(JsonValue(parse_tokens(tokens)))
        except JsonSyntaxError as error:
            token = error.token
            found.append(JsonError(f"{token.line}:{token.column}: JSON parse error, {error.text}"))

    def _advance(self, raw: bytes) -> None:
        lines = raw.count(b"\n")
        if lines:
            self._line += lines
            self._column = len(raw) - raw.rfind(b"\n")
        else:
            self._column += len(raw)

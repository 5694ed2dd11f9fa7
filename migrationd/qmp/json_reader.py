r"""An incremental JSON reader: values are found by bracket balance, not by lines.

Pure: bytes in, values and errors out. QMP clients send no newline, several values in
one write, and one value in many. Each byte is looked at once, whatever the pieces are,
and no more than the limits is ever kept.

Reference: QEMU 11.1's reader: its limits, its recovery after an error, its texts with
``LINE:COLUMN:`` in front; single-quoted strings and ``\\'`` are accepted.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from migrationd.qmp.json_parser import MISSING, JsonParser, JsonSyntaxError, decode_leniently

TOKEN_BYTES_LIMIT = 64 << 20
TOKEN_COUNT_LIMIT = 2 << 20
NESTING_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A complete value."""

    value: object


@dataclass(frozen=True, slots=True)
class JsonError:
    """Why input was dropped; the text for the client."""

    text: str


@dataclass(frozen=True, slots=True)
class _State:
    """One state of the lexer, inside a token.

    Attributes:
        run: Bytes that stay in this state.
        next: State after a byte that ``run`` does not take; None ends the token with it.
        is_complete: Whether another byte ends the token before itself; if not, it makes
            the token malformed.
    """

    run: re.Pattern[bytes]
    next: "dict[int, _State | None]"
    is_complete: bool = False


_NOTHING = re.compile(rb"")
_DIGITS = re.compile(rb"[0-9]*+")
_ANY_DIGIT = b"0123456789"
_BREAKS_STRING = b"\xfe\xff" + bytes(range(0x20))


def _one_of(characters: bytes, state: _State) -> dict[int, _State | None]:
    return dict.fromkeys(characters, state)


_EXPONENT_DIGITS = _State(_DIGITS, {}, is_complete=True)
_EXPONENT_SIGN = _State(_NOTHING, _one_of(_ANY_DIGIT, _EXPONENT_DIGITS))
_EXPONENT = _State(_NOTHING, _one_of(b"+-", _EXPONENT_SIGN) | _one_of(_ANY_DIGIT, _EXPONENT_DIGITS))
_FRACTION = _State(_DIGITS, _one_of(b"eE", _EXPONENT), is_complete=True)
_POINT = _State(_NOTHING, _one_of(_ANY_DIGIT, _FRACTION))
_ZERO = _State(_NOTHING, _one_of(b".", _POINT), is_complete=True)  # no 0e1, as in QEMU
_INTEGER = _State(_DIGITS, _one_of(b".", _POINT) | _one_of(b"eE", _EXPONENT), is_complete=True)
_MINUS = _State(_NOTHING, _one_of(b"0", _ZERO) | _one_of(b"123456789", _INTEGER))
_WORD = _State(re.compile(rb"[a-z]*+"), {}, is_complete=True)


def _string_state(quote: int) -> _State:
    inside = _State(
        re.compile(rb"[^\\\x00-\x1f\xfe\xff" + re.escape(bytes((quote,))) + rb"]*+"), {quote: None}
    )
    allowed = bytes(byte for byte in range(256) if byte not in _BREAKS_STRING)
    inside.next[ord("\\")] = _State(_NOTHING, _one_of(allowed, inside))
    return inside


_START: dict[int, _State | None] = (
    dict.fromkeys(b"{}[]:,")
    | {quote: _string_state(quote) for quote in b"\"'"}
    | _one_of(b"-", _MINUS)
    | _one_of(b"0", _ZERO)
    | _one_of(b"123456789", _INTEGER)
    | _one_of(bytes(range(ord("a"), ord("z") + 1)), _WORD)
)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_RECOVERED = re.compile(rb"[][{}:,\x00-\x08\x0a-\x1f\xfe\xff]")
_STEP = {ord("{"): (1, 0), ord("}"): (-1, 0), ord("["): (0, 1), ord("]"): (0, -1)}


_PLAIN = re.compile(rb"[ !#-&(-\[\]-~\"]*+")
"""ASCII without escapes, single quotes and line ends: what JSON and QEMU's JSON agree on."""

_BRACE = ord("{")
_PLAIN_NESTING = 64
_PLAIN_DIGITS = 18


class _NotPlain(Exception):
    """The slow way has to look at it."""


def _plain_object(members: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) != len(members):
        raise _NotPlain
    return found


def _plain_integer(text: str) -> int:
    if len(text) > _PLAIN_DIGITS:
        raise _NotPlain
    return int(text)


def _not_plain(_: str) -> object:
    raise _NotPlain


_PLAIN_DECODER = json.JSONDecoder(
    object_pairs_hook=_plain_object,
    parse_int=_plain_integer,
    parse_float=_not_plain,
    parse_constant=_not_plain,
)


class JsonReader:
    """Reads one connection.

    A whole object at the beginning of the input that is written plainly, as nearly all
    are, is read by the library; everything else, and every error, byte by byte.
    """

    def __init__(self) -> None:
        self._line = 1
        self._column = 1
        self._is_recovering = False
        self._parser = JsonParser()
        self._found: list[JsonValue | JsonError] = []
        self._begin_token()
        self._begin_value()

    @property
    def is_between_values(self) -> bool:
        """Whether nothing of a further value has been read."""
        return self._state is None and self._token_count == 0 and not self._is_recovering

    def feed(self, data: bytes) -> list[JsonValue | JsonError]:
        """Add bytes.

        Returns:
            Values and errors that are complete now, in order.
        """
        self._found = []
        at = 0
        while at < len(data):
            if data[at] == _BRACE and self.is_between_values and not self._is_looked_at:
                at = self._read_plainly(data, at)
                if at == len(data):
                    break
            if self._state is not None:
                at = self._continue_token(data, at)
            elif self._is_recovering:
                at = self._recover(data, at)
            else:
                at = self._start_token(data, at)
        return self._found

    def _read_plainly(self, data: bytes, start: int) -> int:
        """Read objects of one line; where they end."""
        plain = _PLAIN.match(data, start)
        assert plain is not None
        text = plain[0].decode("ascii")
        at = 0
        try:
            while text.startswith("{", at):
                value, end = _PLAIN_DECODER.raw_decode(text, at)
                if text.count("{", at, end) + text.count("[", at, end) > _PLAIN_NESTING:
                    break
                self._found.append(JsonValue(value))
                at = end
        except (_NotPlain, ValueError, RecursionError):
            pass
        self._column += at
        return start + at

    def _begin_token(self) -> None:
        self._state: _State | None = None
        self._token = bytearray()
        self._is_looked_at = False

    def _begin_value(self) -> None:
        self._parser.reset()
        self._token_count = 0
        self._token_bytes = 0
        self._braces = 0
        self._brackets = 0
        self._is_skipping = False

    def _start_token(self, data: bytes, at: int) -> int:
        space = _SPACE.match(data, at)
        assert space is not None
        if space.end() > at:
            self._is_looked_at = False
            self._advance(data, at, space.end())
            at = space.end()
            if at == len(data):
                return at
        first = data[at]
        # QEMU counts a byte twice that ended the token or the recovery before it.
        self._token_line = self._line
        self._token_column = self._column + self._is_looked_at
        self._is_looked_at = False
        self._token += data[at : at + 1]
        self._advance(data, at, at + 1)
        if first not in _START:
            self._stray()
            return at + 1
        self._state = _START[first]
        if self._state is None:
            self._end_token()
        return at + 1

    def _continue_token(self, data: bytes, at: int) -> int:
        state = self._state
        assert state is not None
        run = state.run.match(data, at)
        assert run is not None
        end = run.end()
        self._token += data[at:end]
        self._advance(data, at, end)
        if len(self._token) > TOKEN_BYTES_LIMIT:
            self._limit("JSON token size limit exceeded")
            self._begin_token()
            self._is_recovering = True
            return end
        if end == len(data):
            return end
        byte = data[end]
        if byte not in state.next and state.is_complete and not self._is_leading_zero(byte):
            self._end_token()
            self._is_looked_at = True
            return end
        self._token.append(byte)
        self._advance(data, end, end + 1)
        if byte in state.next:
            self._state = state.next[byte]
            if self._state is None:
                self._end_token()
        else:
            self._stray()
        return end + 1

    def _is_leading_zero(self, byte: int) -> bool:
        return self._state is _ZERO and byte in _ANY_DIGIT

    def _recover(self, data: bytes, at: int) -> int:
        match = _RECOVERED.search(data, at)
        end = match.start() if match else len(data)
        self._advance(data, at, end)
        if match:
            self._is_recovering = False
            self._is_looked_at = True
        return end

    def _stray(self) -> None:
        """Report a malformed token, and forget the value that it is in."""
        if not self._is_skipping:
            # The text ends at a NUL, as C strings do.
            shown = decode_leniently(bytes(self._token).partition(b"\0")[0])
            self._error(f"stray '{shown}'")
        self._begin_token()
        self._begin_value()
        self._is_recovering = True

    def _end_token(self) -> None:
        token = bytes(self._token)
        self._begin_token()
        braces, brackets = _STEP.get(token[0], (0, 0))
        self._braces += braces
        self._brackets += brackets
        self._token_count += 1
        self._token_bytes += len(token)
        if not self._is_skipping:
            self._parse(token)
        if self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
            self._begin_value()

    def _parse(self, token: bytes) -> None:
        if self._token_bytes > TOKEN_BYTES_LIMIT:
            self._limit("JSON token size limit exceeded")
        elif self._token_count > TOKEN_COUNT_LIMIT:
            self._limit("JSON token count limit exceeded")
        elif self._braces + self._brackets > NESTING_LIMIT:
            self._limit("JSON nesting depth limit exceeded")
        else:
            try:
                value = self._parser.push(token)
            except JsonSyntaxError as error:
                self._error(str(error))
                self._skip()
            else:
                if value is not MISSING:
                    self._found.append(JsonValue(value))

    def _error(self, text: str) -> None:
        where = f"{self._token_line}:{self._token_column}"
        self._found.append(JsonError(f"{where}: JSON parse error, {text}"))

    def _limit(self, text: str) -> None:
        if not self._is_skipping:
            self._found.append(JsonError(text))
        self._skip()

    def _skip(self) -> None:
        """Drop the rest of this value in silence."""
        self._is_skipping = True
        self._parser.reset()

    def _advance(self, data: bytes, start: int, end: int) -> None:
        lines = data.count(b"\n", start, end)
        if lines:
            self._line += lines
            self._column = end - data.rfind(b"\n", start, end)
        else:
            self._column += end - start

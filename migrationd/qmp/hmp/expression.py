"""Integer arguments of the human monitor: C-like expressions.

Reference: what QEMU's monitor takes for an integer: ``+ - * / % & | ^ ~``, brackets,
decimal, octal and hexadecimal numbers, and one character in single quotes. There are no
registers here.
"""

import re

from migrationd.qmp.hmp.errors import UsageError

DEPTH_LIMIT = 64

_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
_UINT_MAX = (1 << 64) - 1
_PRODUCTS = "*/%"
_BITS = "&|^"
_SUMS = "+-"


def read_integer(text: str, at: int) -> tuple[int, int]:
    """Read an expression.

    Args:
        text: The command line.
        at: Where it begins.

    Returns:
        Its value as a signed 64-bit number, and where the rest begins.

    Raises:
        UsageError: It is none.
    """
    reader = _Reader(text, at)
    value = reader.sum(0) & _UINT_MAX
    return value - (1 << 64) if value >> 63 else value, reader.at


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self._text = text
        self.at = at
        self._skip()

    def sum(self, depth: int) -> int:
        value = self._bits(depth)
        while (sign := self._take(_SUMS)) is not None:
            other = self._bits(depth)
            value = value + other if sign == "+" else value - other
        return value

    def _bits(self, depth: int) -> int:
        value = self._product(depth)
        while (sign := self._take(_BITS)) is not None:
            other = self._product(depth)
            value = (
                value & other if sign == "&" else value | other if sign == "|" else value ^ other
            )
        return value

    def _product(self, depth: int) -> int:
        value = self._unary(depth)
        while (sign := self._take(_PRODUCTS)) is not None:
            other = self._unary(depth) & _UINT_MAX
            if sign == "*":
                value = value * other & _UINT_MAX
                continue
            if other == 0:
                raise UsageError("division by zero")
            value &= _UINT_MAX
            value = value // other if sign == "/" else value % other
        return value

    def _unary(self, depth: int) -> int:
        if depth > DEPTH_LIMIT:
            raise UsageError("expression nested too deeply")
        if self.at == len(self._text):
            raise UsageError("unexpected end of expression")
        sign = self._take("+-~(")
        if sign == "(":
            value = self.sum(depth + 1)
            if self._take(")") is None:
                raise UsageError("')' expected")
            return value
        if sign is not None:
            value = self._unary(depth + 1)
            return value if sign == "+" else -value if sign == "-" else ~value
        return self._constant()

    def _constant(self) -> int:
        first = self._text[self.at]
        if first == "'":
            character = self._text[self.at + 1 : self.at + 2]
            if not character:
                raise UsageError("character constant expected")
            if self._text[self.at + 2 : self.at + 3] != "'":
                raise UsageError("missing terminating ' character")
            self._skip(3)
            return ord(character)
        if first == "$":
            raise UsageError("unknown register")
        number = _NUMBER.match(self._text, self.at)
        if number is None:
            raise UsageError(f"invalid char '{first}' in expression")
        digits = number[0]
        if digits.startswith("0") and digits.isdigit():
            octal = re.match("[0-7]+", digits)
            assert octal is not None
            digits = octal[0]
        if len(digits) > 24:
            raise UsageError("number too large")
        base = 16 if digits[:2] in ("0x", "0X") else 8 if digits.startswith("0") else 10
        value = int(digits, base)
        if value > _UINT_MAX:
            raise UsageError("number too large")
        self._skip(len(digits))
        return value

    def _take(self, characters: str) -> str | None:
        found = self._text[self.at : self.at + 1]
        if not found or found not in characters:
            return None
        self._skip(1)
        return found

    def _skip(self, count: int = 0) -> None:
        space = _SPACE.match(self._text, self.at + count)
        assert space is not None
        self.at = space.end()

"""The words behind a human command.

Reference: QEMU's human monitor: its kinds of arguments and the texts for wrong ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from migrationd.qmp.hmp.errors import UsageError
from migrationd.qmp.hmp.expression import read_integer

_SPACE = " \t\n\r\v\f"
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument.

    Attributes:
        name: Key of its value.
        kind: ``flag``, ``word``, ``rest`` (of the line), ``switch`` (on or off) or ``integer``.
        letter: Of a flag.
        is_optional: Whether it may be absent.
    """

    name: str
    kind: str
    letter: str = ""
    is_optional: bool = False


def flag(letter: str, name: str) -> Argument:
    """``-x``."""
    return Argument(name, "flag", letter, is_optional=True)


def word(name: str, *, optional: bool = False) -> Argument:
    """A word, or text in double quotes."""
    return Argument(name, "word", is_optional=optional)


def rest(name: str, *, optional: bool = False) -> Argument:
    """Everything up to the end of the line, as it is."""
    return Argument(name, "rest", is_optional=optional)


def switch(name: str) -> Argument:
    """``on`` or ``off``."""
    return Argument(name, "switch")


def integer(name: str, *, optional: bool = False) -> Argument:
    """An expression."""
    return Argument(name, "integer", is_optional=optional)


def parse(text: str, arguments: Sequence[Argument], command: str) -> dict[str, object]:
    """Values of a command's arguments.

    Args:
        text: What follows the command's name.
        arguments: In order.
        command: How texts call the command.

    Returns:
        Absent ones are not in it; flags are always.

    Raises:
        UsageError: The text does not fit.
    """
    values: dict[str, object] = {}
    at = 0
    for number, argument in enumerate(arguments):
        at = _skip(text, at)
        if argument.kind == "flag":
            letters = {other.letter for other in arguments[number + 1 :] if other.kind == "flag"}
            values[argument.name], at = _flag(text, at, argument.letter, letters, command)
        elif argument.is_optional and at == len(text):
            continue
        elif argument.kind == "word":
            value, at = read_word(text, at)
            if value is None:
                raise UsageError(f"{command}: string expected")
            values[argument.name] = value
        elif argument.kind == "rest":
            if at == len(text):
                raise UsageError(f"{command}: string expected")
            values[argument.name], at = text[at:], len(text)
        elif argument.kind == "switch":
            value, at = _raw_word(text, at)
            if value not in ("on", "off"):
                raise UsageError("Expected 'on' or 'off'")
            values[argument.name] = value == "on"
        else:
            values[argument.name], at = read_integer(text, at)
    if _skip(text, at) < len(text):
        raise UsageError(f"{command}: extraneous characters at the end of line")
    return values


def read_word(text: str, at: int) -> tuple[str | None, int]:
    """A word or a text in double quotes, and where the rest begins; None if there is none."""
    at = _skip(text, at)
    if text[at : at + 1] != '"':
        value, end = _raw_word(text, at)
        return value or None, end
    out: list[str] = []
    at += 1
    while at < len(text) and text[at] != '"':
        if text[at] == "\\":
            at += 1
            if text[at : at + 1] not in _ESCAPES:
                return None, at
            out.append(_ESCAPES[text[at]])
        else:
            out.append(text[at])
        at += 1
    return (None, at) if at == len(text) else ("".join(out), at + 1)


def _raw_word(text: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(text) and text[end] not in _SPACE:
        end += 1
    return text[at:end], end


def _flag(text: str, at: int, letter: str, later: set[str], command: str) -> tuple[bool, int]:
    if text[at : at + 1] != "-":
        return False, at
    found = text[at + 1 : at + 2]
    if found == letter:
        return True, at + 2
    if found in later:
        return False, at
    raise UsageError(f"{command}: unsupported option -{found}", ends_line=bool(found))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at

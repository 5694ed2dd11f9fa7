"""What every user-made object is."""

import os
import re
from collections.abc import Callable, Mapping
from typing import ClassVar

from migrationd.errors import ObjectError

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")

FILE_LIMIT_BYTES = 1 << 20
"""Largest file of a secret, a key or certificates."""

Properties = Mapping[str, object]
"""Values by QMP name, already of the right JSON type."""


class UserObject:
    """One object; frozen once it is made.

    Args:
        properties: As the user gave them.

    Attributes:
        qom_type: Name of the type.
        properties: As the user gave them.
    """

    qom_type: ClassVar[str]

    def __init__(self, properties: Properties) -> None:
        self.properties = dict(properties)

    def close(self) -> None:
        """Give up what the object holds; it is deleted."""


FindObject = Callable[[str], UserObject | None]


def is_identifier(text: str) -> bool:
    """Whether a text may be an object's id."""
    return bool(_IDENTIFIER.match(text))


def text_of(properties: Properties, name: str) -> str | None:
    """A text property; None when it is not given."""
    value = properties.get(name)
    return None if value is None else str(value)


def required_text(properties: Properties, name: str) -> str:
    """A text property that must be given.

    Raises:
        ObjectError: It is not.
    """
    value = text_of(properties, name)
    if value is None:
        raise ObjectError(f"Parameter '{name}' is missing")
    return value


def flag_of(properties: Properties, name: str, *, default: bool) -> bool:
    """A boolean property."""
    value = properties.get(name)
    return default if value is None else bool(value)


def read_small_file(path: str) -> bytes:
    """Read a regular file whole.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    # Non-blocking: a FIFO without a writer must not hold the monitor.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        data = file.read(FILE_LIMIT_BYTES + 1)
    if len(data) > FILE_LIMIT_BYTES:
        raise OSError(27, f"more than {FILE_LIMIT_BYTES} bytes")
    return data

"""Sizes and numbers as people and QEMU write them."""

import re

_DECIMAL = re.compile(r"\s*([+-]?)(\d{1,64})(\.\d{1,64})?([bkmgtpe]?)", re.ASCII | re.IGNORECASE)
_HEX = re.compile(r"\s*([+-]?)0x([0-9a-f]{1,64})", re.ASCII | re.IGNORECASE)
_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_LIMIT = 1 << 64
_WHOLE = re.compile(r"[0-9]{1,19}")

PORT_MAX = 65535
FD_MAX = 1 << 20
"""As many descriptors as Linux lets a process have."""


def parse_size(text: str) -> int:
    """Bytes of a size: ``4096``, ``0x1000``, ``1M`` or ``1.5G``.

    A suffix is binary, in either case; a fraction needs one above ``B``, and a
    hexadecimal number takes none.

    Args:
        text: The size.

    Returns:
        Bytes, below 2^64.

    Raises:
        ValueError: It is no size.
        OverflowError: It is negative, or 2^64 and more.

    Reference:
        The sizes of QEMU's command line and of ``file:`` URIs, as 11.1 takes them.
    """
    if match := _HEX.fullmatch(text):
        size = int(match[2], 16)
    elif match := _DECIMAL.fullmatch(text):
        shift = _SHIFT[match[4].lower()]
        if match[3] and not shift:
            raise ValueError(f"'{text}' is a fraction of a byte")
        size = int(match[2]) << shift
        if match[3]:
            size += (int(match[3][1:]) << shift) // 10 ** (len(match[3]) - 1)
    else:
        raise ValueError(f"'{text}' is no size")
    if size >= _LIMIT or (match[1] == "-" and size):
        raise OverflowError(f"'{text}' is out of range")
    return size


def parse_whole(text: str, most: int) -> int | None:
    """A whole number from 0 to ``most`` in ASCII digits; None if the text is anything else."""
    number = int(text) if _WHOLE.fullmatch(text) else most + 1
    return number if number <= most else None

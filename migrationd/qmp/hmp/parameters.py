"""``migrate_set_parameter``: a value's text to what ``migrate-set-parameters`` takes.

Reference: QEMU 11.1, its units and texts.
"""

import re
import shlex
from collections.abc import Callable

from migrationd.qmp.hmp.errors import PlainError

_SIZE_LIMIT = 1 << 64
_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DECIMAL = re.compile(r"\s*\+?([0-9]{1,40})(?:\.([0-9]{0,40}))?([bkmgtpe]?)", re.IGNORECASE)
_HEX = re.compile(r"\s*\+?0x([0-9a-f]{1,16})", re.IGNORECASE)
_UINT64 = re.compile(r"\s*([+-]?)(0x[0-9a-f]{1,40}|0[0-7]{0,40}|[1-9][0-9]{0,40})", re.IGNORECASE)
_SWITCH = {"on": True, "yes": True, "true": True, "y": True,
           "off": False, "no": False, "false": False, "n": False}  # fmt: skip


def parse_parameter(name: str, text: str) -> object:
    """The JSON value for a parameter.

    Args:
        name: QMP name of the parameter.
        text: What was typed.

    Raises:
        PlainError: There is no such parameter, or the text is no value of it.
    """
    if name == "block-bitmap-mapping":
        raise PlainError("The block-bitmap-mapping parameter can only be set through QMP")
    if name not in PARAMETERS:
        raise PlainError(f"invalid parameter value: {name}")
    return PARAMETERS[name](name, text)


def read_size(text: str, unit_shift: int) -> int | None:
    """Bytes of a size with an optional suffix, or None if it is none.

    Args:
        text: For example ``1.5G`` or ``0x10``.
        unit_shift: What a number without a suffix is counted in, as a power of two.
    """
    found = _HEX.fullmatch(text)
    if found:
        size = int(found[1], 16) << unit_shift
        return size if size < _SIZE_LIMIT else None
    found = _DECIMAL.fullmatch(text)
    if not found:
        return None
    whole, fraction, suffix = int(found[1]), found[2] or "", found[3].lower()
    shift = _SUFFIXES[suffix] if suffix else unit_shift
    if fraction.strip("0") and shift == 0:
        return None
    size = (whole << shift) + ((int(fraction or "0") << shift) // 10 ** len(fraction))
    return size if size < _SIZE_LIMIT else None


def _size(name: str, text: str) -> int:
    size = read_size(text, 0)
    if size is not None:
        return size
    if re.fullmatch(r"\s*-[0-9]+|\s*\+?[0-9]+[bkmgtpe]?", text, re.IGNORECASE):
        raise PlainError(f"Value '{text}' is out of range for parameter '{name}'")
    raise PlainError(
        f"Parameter '{name}' expects a non-negative number below 2^64\n"
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        "and exabytes, respectively."
    )


def _mebibytes(_: str, text: str) -> int:
    size = read_size(text, 20)
    if size is None:
        raise PlainError(f"Invalid size {text}")
    return size


def _unsigned(bits: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        found = _UINT64.fullmatch(text)
        if not found:
            raise PlainError(f"Parameter '{name}' expects uint64")
        digits = found[2].lower()
        base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
        value = int(digits, base)
        if value >= _SIZE_LIMIT:
            raise PlainError(f"Parameter '{name}' expects uint64")
        if value >> bits or found[1] == "-":
            raise PlainError(f"Parameter '{name}' expects uint{bits}_t")
        return value

    return parse


def _switch(name: str, text: str) -> bool:
    if text not in _SWITCH:
        raise PlainError(f"Parameter '{name}' expects 'on' or 'off'")
    return _SWITCH[text]


def _text(_: str, text: str) -> str:
    return text


def _words(_: str, text: str) -> list[str]:
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split = True
    words.commenters = ""
    try:
        return list(words)
    except ValueError:
        quote = _open_quote(text)
        problem = (
            f"Text ended before matching quote was found for {quote}."
            if quote
            else "Text ended just after a \u201c\\\u201d character."
        )
        raise PlainError(f"{problem} (The text was \u201c{text}\u201d)") from None


def _open_quote(text: str) -> str:
    quote = ""
    is_escaped = False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif character == "\\" and quote != "'":
            is_escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
    return quote


_BYTE = _unsigned(8)

PARAMETERS: dict[str, Callable[[str, str], object]] = {
    "announce-initial": _size,
    "announce-max": _size,
    "announce-rounds": _size,
    "announce-step": _size,
    "throttle-trigger-threshold": _BYTE,
    "cpu-throttle-initial": _BYTE,
    "cpu-throttle-increment": _BYTE,
    "cpu-throttle-tailslow": _switch,
    "max-cpu-throttle": _BYTE,
    "tls-creds": _text,
    "tls-hostname": _text,
    "tls-authz": _text,
    "max-bandwidth": _mebibytes,
    "avail-switchover-bandwidth": _mebibytes,
    "max-postcopy-bandwidth": _size,
    "downtime-limit": _size,
    "x-checkpoint-delay": _unsigned(32),
    "multifd-channels": _BYTE,
    "multifd-compression": _text,
    "multifd-zlib-level": _BYTE,
    "multifd-qatzip-level": _BYTE,
    "multifd-zstd-level": _BYTE,
    "zero-page-detection": _text,
    "xbzrle-cache-size": _size,
    "x-vcpu-dirty-limit-period": _size,
    "vcpu-dirty-limit": _size,
    "mode": _text,
    "direct-io": _switch,
    "x-rdma-chunk-size": _size,
    "cpr-exec-command": _words,
}

"""Objects to bytes, as QEMU writes them: ASCII, a space after ``:`` and ``,``, CR LF."""

import json
import math


def encode_message(message: dict[str, object]) -> bytes:
    """One reply, event or greeting."""
    text = json.dumps(_finite(message), ensure_ascii=True, separators=(", ", ": "))
    return text.encode() + b"\r\n"


def _finite(value: object) -> object:
    """Numbers that JSON cannot express can only come from a client's ``id``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value

"""VMDESCRIPTION: what its JSON says about the sizes of device sections.

Reference: stream format 7.5. A field's own ``size`` includes what is nested in it;
lists repeat keys (the last one wins), which does not matter for sizes.
"""

import json
from typing import NamedTuple

_SUBSECTION_HEAD_BYTES = 6
"""Type byte, length of the name, version."""


class DeviceSize(NamedTuple):
    """A FULL section as the description lists it; ``size`` is that of its body in bytes."""

    idstr: str
    instance_id: int
    size: int


def device_sizes(description: bytes) -> list[DeviceSize]:
    """Body sizes of the FULL sections, in stream order.

    Pointer arrays with empty elements make a size too large or too small before QEMU 10.0:
    take it as a hint.

    Args:
        description: The JSON.

    Returns:
        One entry for each device; empty if none is listed.

    Raises:
        ValueError: Not JSON, or not of the expected form.
    """
    try:
        devices = _list(_object(json.loads(description)), "devices")
        return [_device(_object(device)) for device in devices]
    except RecursionError:
        raise ValueError("the description is nested too deeply") from None


def _device(device: dict[str, object]) -> DeviceSize:
    idstr = _text(device, "name")
    if "vmsd_name" not in device and "size" in device:
        size = _number(device, "size")
    else:
        size = _struct_size(device)
    instance_id = _number(device, "instance_id")
    if not 0 < len(idstr) <= 255 or instance_id >= 1 << 32:
        raise ValueError(f"device {idstr!r}, instance {instance_id}")
    return DeviceSize(idstr, instance_id, size)


def _struct_size(struct: dict[str, object]) -> int:
    size = 0
    for entry in _list(struct, "fields"):
        field = _object(entry)
        size += _number(field, "size") * _number(field, "array_len", 1)
    for entry in _list(struct, "subsections"):
        section = _object(entry)
        size += _SUBSECTION_HEAD_BYTES + len(_text(section, "vmsd_name")) + _struct_size(section)
    return size


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected, not {type(value).__name__}")
    return value


def _list(parent: dict[str, object], key: str) -> list[object]:
    value = parent.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"'{key}' is no list")
    return value


def _text(parent: dict[str, object], key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str) or not value.isascii():
        raise ValueError(f"'{key}' is no ASCII text")
    return value


def _number(parent: dict[str, object], key: str, default: int | None = None) -> int:
    value = parent.get(key, default)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"'{key}' is no number of bytes")
    return value

"""VMDESCRIPTION: what its JSON says about the sizes of device sections.

Reference: stream format 7.5. A field's own ``size`` includes what is nested in it;
lists repeat keys (the last one wins), which does not matter for sizes.
"""

import json
import re
from typing import NamedTuple

from migrationd.codec.records import Configuration

_FIRST_CONFIGURATION = re.compile(r'\s*\{\s*"configuration"\s*:\s*')
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


def with_configuration(description: bytes, configuration: Configuration) -> bytes:
    """A description that fits the CONFIGURATION in front of it.

    A guest may leave in another form than the one it came in, with other subsections of
    the configuration. The rest of the text stays as it is.

    Args:
        description: The JSON; returned as it is if it describes nothing.
        configuration: What the stream begins with.
    """
    wanted = _describe(configuration)
    try:
        text = description.decode()
        if (found := _FIRST_CONFIGURATION.match(text)) is not None:
            before, end = json.JSONDecoder().raw_decode(text, found.end())
            if before.get("subsections", []) == wanted.get("subsections", []):
                return description
            return f"{text[: found.end()]}{json.dumps(wanted)}{text[end:]}".encode()
        head, brace, rest = text.partition("{")
    except (ValueError, AttributeError, RecursionError):
        return description
    if "subsections" not in wanted or head.strip() or not brace or rest.strip() == "}":
        return description  # as of QEMU before 8.2, which describes none
    return f'{{"configuration": {json.dumps(wanted)}, {rest}'.encode()


def _describe(configuration: Configuration) -> dict[str, object]:
    """The object of a CONFIGURATION, in QEMU's words and order."""
    subsections = []
    if configuration.target_page_bits is not None:
        field = {"name": "target_page_bits", "type": "uint32", "size": 4}
        subsections.append(_subsection("target-page-bits", [field]))
    if configuration.capabilities is not None:
        names = [
            {"name": "capabilities", "type": "capability", "size": 1 + len(name)}
            for name in configuration.capabilities
        ]
        if len(names) > 1:
            names = [{**field, "index": index} for index, field in enumerate(names)]
        count = {"name": "caps_count", "type": "uint32", "size": 4}
        subsections.append(_subsection("capabilities", [count, *names]))
    if configuration.uuid is not None:
        subsections.append(_subsection("uuid", [{"name": "uuid", "type": "buffer", "size": 16}]))
    out: dict[str, object] = {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": len(configuration.machine)},
        ],
    }
    return out | ({"subsections": subsections} if subsections else {})


def _subsection(name: str, fields: list[dict[str, object]]) -> dict[str, object]:
    return {"vmsd_name": f"configuration/{name}", "version": 1, "fields": fields}


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

"""VMDESCRIPTION: what its JSON says about the sizes of device sections.

Reference: stream format 7.5. A field's own ``size`` includes what is nested in it;
lists repeat keys (the last one wins), which does not matter for sizes.
"""

import json
from typing import Any


def device_sizes(description: bytes) -> list[tuple[str, int, int]]:
    """Body sizes of the FULL sections, in stream order.

    Args:
        description: The JSON.

    Returns:
        idstr, instance id and size in bytes of each; empty if it lists no devices.

    Raises:
        ValueError: Not JSON, or not of the expected form.
    """
    try:
        tree = json.loads(description)
        return [
            (str(device["name"]), int(device["instance_id"]), _device_size(device))
            for device in tree.get("devices", ())
        ]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a VMDESCRIPTION: {error!r}") from None


def _device_size(device: dict[str, Any]) -> int:
    if "vmsd_name" not in device and "size" in device:
        return int(device["size"])
    return _struct_size(device)


def _struct_size(struct: dict[str, Any]) -> int:
    size = sum(
        int(field["size"]) * int(field.get("array_len", 1)) for field in struct.get("fields", ())
    )
    return size + sum(
        2 + len(section["vmsd_name"]) + 4 + _struct_size(section)
        for section in struct.get("subsections", ())
    )

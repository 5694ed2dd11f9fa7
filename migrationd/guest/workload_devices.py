"""A workload's devices as sections of a stream.

Its devices are FULL sections in VMState form; its declarations travel early, so that a
destination which cannot load them refuses before the source stops.
"""

import json
import re
from collections.abc import Mapping, Sequence

from migrationd.errors import GuestError
from migrationd.guest.device import DeviceState
from migrationd.guest.protocol import NAME_PATTERN, Saved, SavedDevice
from migrationd.guest.run_state import GLOBAL_STATE, GLOBAL_STATE_BYTES, encode_run_state

DECLARATIONS = "migrationd/declarations"
"""Section with the declarations of a workload's devices, as JSON; sent before RAM."""

_TAKEN = (DECLARATIONS, GLOBAL_STATE, "ram")
_FULL = 0x04
_FIRST_SECTION = 2
"""Section id of the first device; 0 is that of the declarations, 1 is left for RAM."""


def declarations_section(devices: Sequence[object]) -> DeviceState:
    """The section that tells a destination what will come."""
    body = json.dumps(devices).encode()
    return DeviceState(DECLARATIONS, 0, 1, body, _FULL, 0, is_early=True)


def declared_keys(devices: Sequence[Mapping[str, object]]) -> list[tuple[str, int]]:
    """Names and instances of declared devices.

    Raises:
        GuestError: A name is taken, or none; or an instance is none.
    """
    keys: list[tuple[str, int]] = []
    for device in devices:
        name, instance_id = device.get("name"), device.get("instance_id")
        if not isinstance(name, str) or not isinstance(instance_id, int):
            raise GuestError("the workload declares a device without name or instance_id")
        if re.fullmatch(NAME_PATTERN, name) is None or not 0 <= instance_id < 1 << 32:
            raise GuestError(f"the workload declares device {name!r} instance {instance_id}")
        if name in _TAKEN or (name, instance_id) in keys:
            raise GuestError(f"device '{name}' instance {instance_id}: the name is taken")
        keys.append((name, instance_id))
    return keys


def saved_sections(
    saved: Saved, bodies: bytes, keys: Sequence[tuple[str, int]], run_state: str
) -> tuple[DeviceState, ...]:
    """Sections of a workload's saved devices, behind that of its run state.

    Args:
        saved: What the workload saved.
        bodies: All bodies, one behind the other.
        keys: What it has declared.
        run_state: Name of the run state that travels.

    Raises:
        GuestError: It saved something else than it has declared.
    """
    found = [(device.name, device.instance_id) for device in saved.devices]
    if found != keys:
        raise GuestError(f"the workload saves devices {found} and has declared {keys}")
    state = encode_run_state(bytes(GLOBAL_STATE_BYTES), run_state)
    sections = [DeviceState(GLOBAL_STATE, 0, 1, state, _FULL, _FIRST_SECTION)]
    at = 0
    for number, device in enumerate(saved.devices, _FIRST_SECTION + 1):
        body = bodies[at : at + device.length]
        at += device.length
        sections.append(
            DeviceState(device.name, device.instance_id, device.version_id, body, _FULL, number)
        )
    return tuple(sections)


def workload_description(
    saved: Saved, declarations: DeviceState, machine: str | None, page_size: int
) -> bytes:
    """The VMDESCRIPTION of a workload's stream, as JSON."""
    size = len(declarations.body)
    early = {
        "name": DECLARATIONS,
        "instance_id": 0,
        "size": size,
        "fields": [{"name": "data", "size": size, "type": "buffer"}],
    }
    global_state = {
        "name": GLOBAL_STATE,
        "instance_id": 0,
        "vmsd_name": GLOBAL_STATE,
        "version": 1,
        "fields": [
            {"name": "size", "type": "uint32", "size": 4},
            {"name": "runstate", "type": "buffer", "size": GLOBAL_STATE_BYTES - 4},
        ],
    }
    configuration = {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [
            {"name": "len", "type": "uint32", "size": 4},
            {"name": "name", "type": "buffer", "size": len(machine or "")},
        ],
    }
    document = {
        "configuration": configuration,
        "page_size": page_size,
        "devices": [early, global_state, *saved.description],
    }
    return json.dumps(document).encode()


def devices_to_load(devices: Sequence[DeviceState]) -> tuple[Saved, bytes]:
    """What a workload is given to load: its own devices, and their bodies in one."""
    own = [item for item in devices if item.idstr not in (DECLARATIONS, GLOBAL_STATE)]
    saved = Saved(
        devices=[
            SavedDevice(
                name=item.idstr,
                instance_id=item.instance_id,
                version_id=item.version_id,
                length=len(item.body),
            )
            for item in own
        ]
    )
    return saved, b"".join(item.body for item in own)

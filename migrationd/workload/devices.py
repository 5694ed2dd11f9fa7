"""The devices of a workload, and their state in one file without a name."""

import os
from dataclasses import dataclass
from typing import Any

from migrationd.errors import GuestError
from migrationd.workload.vmstate import VMState

RESERVED_INSTANCE_ID = 0xFFFFFFFF
"""Means "the next free one"; no device has it."""


@dataclass(frozen=True, slots=True)
class _Device:
    state: VMState
    instance_id: int
    target: object


class Devices:
    """Devices in the order in which they were declared."""

    def __init__(self) -> None:
        self._devices: list[_Device] = []

    def add(self, state: VMState, target: object, instance_id: int) -> int:
        """Declare a device; see :meth:`Workload.add_device`.

        Raises:
            GuestError: That instance exists, or it is no number of one.
        """
        if not isinstance(instance_id, int) or not 0 <= instance_id <= RESERVED_INSTANCE_ID:
            raise GuestError(f"device '{state.name}': {instance_id!r} is no instance id")
        taken = {item.instance_id for item in self._devices if item.state.name == state.name}
        if instance_id == RESERVED_INSTANCE_ID:
            instance_id = max(taken, default=-1) + 1
        if instance_id in taken:
            raise GuestError(f"there is a device '{state.name}' instance {instance_id} already")
        self._devices.append(_Device(state, instance_id, target))
        return instance_id

    def declarations(self) -> list[dict[str, Any]]:
        """What of each device travels."""
        return [
            item.state.declaration() | {"instance_id": item.instance_id} for item in self._devices
        ]

    def save(self) -> tuple[dict[str, Any], int]:
        """Save them all.

        Returns:
            The answer to ``save``, and a memfd with the bodies one behind the other; the
            caller closes it.

        Raises:
            GuestError: A device cannot be saved.
        """
        saved = []
        description = []
        bodies = []
        for item in self._devices:
            if item.state.unmigratable is not None:
                raise GuestError(
                    f"device '{item.state.name}' cannot migrate: {item.state.unmigratable}"
                )
            body, described = item.state.encode(item.target)
            bodies.append(body)
            key = {"name": item.state.name, "instance_id": item.instance_id}
            saved.append(key | {"version_id": item.state.version_id, "length": len(body)})
            description.append(key | described)
        fd = os.memfd_create("migrationd-devices", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(b"".join(bodies))
        return {"devices": saved, "description": description}, fd

    def load(self, saved: list[dict[str, Any]], fd: int) -> None:
        """Load what :meth:`save` has made.

        Args:
            saved: ``devices`` of its answer.
            fd: The bodies; stays open.

        Raises:
            GuestError: A device does not exist here, or its state does not fit.
        """
        by_key = {(item.state.name, item.instance_id): item for item in self._devices}
        at = 0
        for entry in saved:
            item = by_key.get((entry["name"], entry["instance_id"]))
            if item is None:
                raise GuestError(
                    f"device '{entry['name']}' instance {entry['instance_id']} does not exist here"
                )
            body = os.pread(fd, entry["length"], at)
            if len(body) != entry["length"]:
                raise GuestError(f"device '{entry['name']}': the state is cut short")
            at += len(body)
            item.state.decode(body, item.target, entry["version_id"])

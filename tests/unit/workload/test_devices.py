"""A workload's devices and their state in a memfd."""

import os
from types import SimpleNamespace

import pytest

from migrationd.errors import GuestError
from migrationd.workload import VMState, u32
from migrationd.workload.devices import RESERVED_INSTANCE_ID, Devices

CLOCK = VMState("clock", 1, fields=(u32("ticks"),))


def made(*ticks: int) -> tuple[Devices, list[SimpleNamespace]]:
    devices = Devices()
    targets = [SimpleNamespace(ticks=value) for value in ticks]
    for target in targets:
        devices.add(CLOCK, target, RESERVED_INSTANCE_ID)
    return devices, targets


def test_instances_are_numbered_and_unique() -> None:
    devices, _ = made(1, 2)
    assert [item["instance_id"] for item in devices.declarations()] == [0, 1]
    assert devices.add(CLOCK, object(), 7) == 7
    assert devices.add(CLOCK, object(), RESERVED_INSTANCE_ID) == 8
    with pytest.raises(GuestError, match="a device 'clock' instance 7 already"):
        devices.add(CLOCK, object(), 7)
    for number in (-1, 1 << 32, "7", None):
        with pytest.raises(GuestError, match="is no instance id"):
            devices.add(CLOCK, object(), number)  # type: ignore[arg-type]


def test_what_one_saves_another_loads() -> None:
    answer, fd = made(11, 22)[0].save()
    there, targets = made(0, 0)
    try:
        there.load(answer["devices"], fd)
    finally:
        os.close(fd)
    assert [target.ticks for target in targets] == [11, 22]
    assert [item["name"] for item in answer["description"]] == ["clock", "clock"]


def test_what_does_not_fit_is_named() -> None:
    answer, fd = made(1, 2)[0].save()
    try:
        with pytest.raises(GuestError, match="'clock' instance 1 does not exist here"):
            made(0)[0].load(answer["devices"], fd)
        os.ftruncate(fd, 6)
        with pytest.raises(GuestError, match="'clock': the state is cut short"):
            made(0, 0)[0].load(answer["devices"], fd)
    finally:
        os.close(fd)

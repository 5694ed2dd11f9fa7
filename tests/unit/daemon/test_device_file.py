"""Devices in a file beside a ``stop`` and a ``cont``."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from migrationd.clock import SystemClock
from migrationd.daemon.device_file import DeviceFiles
from migrationd.errors import QMPError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.run_state import Owner
from migrationd.qmp.event_bus import EventBus

if TYPE_CHECKING:
    from migrationd.daemon.shelter import Shelter
    from migrationd.guest.attached import AttachedGuest


class Workload:
    """A guest that runs, and notes whether somebody else could stop or start it meanwhile."""

    def __init__(self) -> None:
        self.is_running = True
        self.live = self
        self.file = None
        self.owner = Owner.HELD
        self.identity = GuestIdentity(machine="migrationd-test")
        self.seen = SeenOnArrival()
        self.devices = ()
        self.disturbed: list[bool] = []
        self._lock = threading.RLock()

    def run_state_held(self) -> threading.RLock:
        return self._lock

    def stop(self) -> bool:
        was_running, self.is_running = self.is_running, False
        return was_running

    def start(self) -> bool:
        self.is_running = True
        return True

    def save_devices(self, *, was_running: bool) -> None:
        assert was_running
        assert not self.is_running
        self._look()

    def complete(self, *_: object) -> None:
        self._look()

    def _look(self) -> None:
        def try_it() -> None:
            is_free = self._lock.acquire(blocking=False)
            self.disturbed.append(is_free)
            if is_free:
                self._lock.release()

        other = threading.Thread(target=try_it)
        other.start()
        other.join()


def files(workload: Workload) -> tuple[DeviceFiles, list[str]]:
    names: list[str] = []
    bus = EventBus(SystemClock())
    bus.attach(lambda event: names.append(str(event["event"])))
    shelter = cast("Shelter", SimpleNamespace(occupied=lambda _: contextlib.nullcontext()))
    guest = cast("AttachedGuest", workload)
    return DeviceFiles(bus, shelter, lambda: guest, lambda: False), names


async def test_nobody_starts_or_stops_it_while_its_devices_are_saved(tmp_path: Path) -> None:
    workload = Workload()
    device_files, events = files(workload)
    await device_files.save(str(tmp_path / "devices"))
    assert workload.disturbed == [False]
    assert workload.is_running
    assert events == ["STOP", "RESUME"]


async def test_nobody_starts_it_while_its_devices_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload()
    device_files, _ = files(workload)
    path = tmp_path / "devices"
    await device_files.save(str(path))
    workload.disturbed.clear()
    with pytest.raises(QMPError, match="Cannot update device state while vm is running"):
        await device_files.load(str(path))
    workload.stop()
    await device_files.load(str(path))
    assert workload.disturbed == [False]

"""``stop`` and ``cont`` beside a migration that stops the guest for a moment only."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.run_control import RunControl
from migrationd.errors import WorkloadSilent
from migrationd.guest.run_state import Owner
from migrationd.qmp.event_bus import EventBus

if TYPE_CHECKING:
    from migrationd.daemon.shelter import Shelter
    from migrationd.guest.held import HeldGuest


class Workload:
    """Runs, or does not."""

    def __init__(self) -> None:
        self.is_running = True
        self._lock = threading.RLock()

    def run_state_held(self) -> threading.RLock:
        return self._lock

    def stop(self) -> bool:
        with self._lock:
            was_running, self.is_running = self.is_running, False
            return was_running

    def start(self) -> bool:
        with self._lock:
            was_running, self.is_running = self.is_running, True
            return not was_running


def run_control(workload: Workload) -> tuple[RunControl, list[str]]:
    """Of a guest that runs, and the names of the events that it emits."""
    names: list[str] = []
    bus = EventBus(SystemClock())
    bus.attach(lambda event: names.append(str(event["event"])))
    control = RunControl(DaemonConfig(), bus, cast("Shelter", None), lambda _: None)
    control.guest = cast(
        "HeldGuest", SimpleNamespace(live=workload, has_memory=True, owner=Owner.HELD)
    )
    return control, names


async def test_one_that_does_not_say_that_it_runs_counts_as_running() -> None:
    class Silent(Workload):
        def start(self) -> bool:
            super().start()
            raise WorkloadSilent

    workload = Silent()
    control, events = run_control(workload)
    await control.stop()
    with pytest.raises(WorkloadSilent):
        await control.cont()
    assert events == ["STOP", "RESUME"]


async def during_a_moment(
    workload: Workload, command: Callable[[], Coroutine[None, None, None]]
) -> None:
    """Execute a command while the guest stands still for a moment."""
    stands_still, goes_on = threading.Event(), threading.Event()

    def stop_for_a_moment() -> None:
        with workload.run_state_held():
            workload.stop()
            stands_still.set()
            goes_on.wait(10)
            workload.start()

    moment = asyncio.create_task(asyncio.to_thread(stop_for_a_moment))
    await asyncio.to_thread(stands_still.wait, 10)
    task = asyncio.create_task(command())
    await asyncio.sleep(0)
    goes_on.set()
    await moment
    await task


async def test_a_guest_that_stands_still_for_a_moment_is_stopped_for_good() -> None:
    workload = Workload()
    control, events = run_control(workload)
    await during_a_moment(workload, control.stop)
    assert not workload.is_running
    assert events == ["STOP"]


async def test_a_guest_that_goes_on_by_itself_is_not_let_go_on_twice() -> None:
    workload = Workload()
    control, events = run_control(workload)
    await during_a_moment(workload, control.cont)
    assert workload.is_running
    assert events == []

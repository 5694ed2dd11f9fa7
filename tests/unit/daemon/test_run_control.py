"""``stop`` beside a migration that stops the guest for a moment only."""

import asyncio
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.run_control import RunControl
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

    def start(self) -> None:
        with self._lock:
            self.is_running = True


async def test_a_guest_that_stands_still_for_a_moment_is_stopped_for_good() -> None:
    workload = Workload()
    guest = cast("HeldGuest", SimpleNamespace(live=workload))
    bus = EventBus(SystemClock())
    control = RunControl(DaemonConfig(), bus, cast("Shelter", None), lambda _: None)
    control.guest = guest
    stands_still, goes_on = threading.Event(), threading.Event()

    def stop_for_a_moment() -> None:
        with workload.run_state_held():
            workload.stop()
            stands_still.set()
            goes_on.wait(10)
            workload.start()

    moment = asyncio.create_task(asyncio.to_thread(stop_for_a_moment))
    await asyncio.to_thread(stands_still.wait, 10)
    stop = asyncio.create_task(control.stop())
    await asyncio.sleep(0)
    goes_on.set()
    await moment
    await stop
    assert not workload.is_running

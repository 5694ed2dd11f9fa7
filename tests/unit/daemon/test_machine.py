"""The guest's surroundings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.machine import Machine, Yankable
from migrationd.daemon.shelter import Shelter
from migrationd.errors import QMPError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.qmp.event_bus import EventBus

if TYPE_CHECKING:
    import asyncio


@dataclass
class Migration:
    is_running: bool
    yanked: bool = False

    def yank(self) -> None:
        self.yanked = True


def make(
    events: list[dict[str, object]],
    guest: ParkedGuest | None,
    *migrations: Yankable | None,
) -> Machine:
    bus = EventBus(SystemClock())
    bus.attach(events.append)
    outgoing, incoming = migrations or (None, None)

    def no_tasks(task: "asyncio.Future[None]") -> None:
        raise AssertionError(task)

    return Machine(
        bus,
        SystemClock(),
        {},
        Shelter(DaemonConfig()),
        guest=lambda: guest,
        migrations=lambda: (outgoing, incoming),
        adopt=lambda _: None,
        spawn=no_tasks,
    )


async def test_without_a_guest() -> None:
    events: list[dict[str, object]] = []
    machine = make(events, None)
    assert (machine.type_name, machine.base_memory_bytes, machine.ram_bytes) == (None, 0, 0)
    await machine.reset()
    await machine.powerdown()
    assert (machine.memory, machine.blockers) == ([], ())
    with pytest.raises(QMPError, match="no guest whose devices"):
        await machine.save_devices("/nonexistent/x")
    assert [(event["event"], event.get("data")) for event in events] == [
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        ("POWERDOWN", None),
    ]


async def test_with_a_guest() -> None:
    guest = ParkedGuest.create(
        GuestIdentity(machine="pc-i440fx-11.1"),
        [RamBlockSpec("pc.rom", 8192, 4096), RamBlockSpec("pc.ram", 65536, 4096)],
        lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size),
    )
    events: list[dict[str, object]] = []
    machine = make(events, guest)
    assert machine.type_name == "pc-i440fx-11.1"
    assert (machine.base_memory_bytes, machine.ram_bytes) == (65536, 73728)
    for act in (machine.reset, machine.powerdown):
        with pytest.raises(QMPError, match="does not run the machine of its guest"):
            await act()
    assert [(part.name, part.size_bytes) for part in machine.memory] == [("pc.ram", 65536)]
    assert events == []


def test_only_what_runs_is_yanked() -> None:
    done, running = Migration(is_running=False), Migration(is_running=True)
    machine = make([], None, done, None)
    assert not machine.is_migration_yankable
    machine = make([], None, done, running)
    assert machine.is_migration_yankable
    assert not machine.is_migrating
    assert make([], None, running, done).is_migrating
    machine.yank_migration()
    assert (done.yanked, running.yanked) == (False, True)

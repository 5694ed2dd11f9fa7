"""Snapshots of a guest in a directory, by the commands of the monitor."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.assembly import assemble
from migrationd.daemon.control import GuestControl
from migrationd.qmp.event_bus import EventBus
from migrationd.store.snapshots import Snapshots
from migrationd.transport.channel import Channel
from tests.support.deadline import until
from tests.support.monitor import Monitor
from tests.unit.store.guests import store_guest


def no_fatal() -> None:
    raise AssertionError("an incoming migration failed")


@asynccontextmanager
async def daemon(ram_dir: Path | None) -> AsyncIterator[tuple[GuestControl, Monitor]]:
    config = DaemonConfig(name="vm1", ram_dir=ram_dir)
    control = await assemble(
        config, EventBus(SystemClock()), on_quit=lambda: None, on_fatal=no_fatal
    )
    monitor = Monitor(control)
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    try:
        yield control, monitor
    finally:
        await control.aclose()


async def ask(monitor: Monitor, command: str, **arguments: object) -> Any:  # noqa: ANN401
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    (reply,) = await monitor.feed(json.dumps({"execute": command, "arguments": given}).encode())
    return reply["return"] if "return" in reply else reply["error"]["desc"]


async def run_job(
    monitor: Monitor, command: str, tag: str, node: str = "ram-dir", devices: int = 1
) -> str | None:
    """Run a job to its end and dismiss it; its error or None."""
    more = {} if command == "snapshot-delete" else {"vmstate": node}
    started = await ask(monitor, command, job_id="job", tag=tag, devices=[node] * devices, **more)
    assert started == {}
    for _ in range(1000):
        (job,) = await ask(monitor, "query-jobs")
        if job["status"] == "concluded":
            break
        await asyncio.sleep(0.005)
    assert (job["status"], job["type"]) == ("concluded", command)
    assert (job["current-progress"], job["total-progress"]) == (1, 1)
    assert await ask(monitor, "job-dismiss", id="job") == {}
    error: str | None = job.get("error")
    return error


async def test_a_state_is_saved_and_taken_up_again(tmp_path: Path) -> None:
    store_guest(tmp_path)
    async with daemon(tmp_path) as (control, monitor):
        guest = control.guest
        assert guest is not None
        assert await ask(monitor, "cont") == {}
        assert guest.next_run_state == "running"
        assert await run_job(monitor, "snapshot-save", "s") is None
        (saved,) = await control.machine.snapshots.list()
        assert saved.tag == "s"
        assert await ask(monitor, "stop") == {}
        assert guest.next_run_state == "paused"
        names = [block.idstr for block in guest.ram]
        assert await run_job(monitor, "snapshot-load", "s") is None
        loaded = control.guest
        assert loaded is not None
        assert loaded is not guest
        assert loaded.next_run_state == "running"
        assert [block.idstr for block in loaded.ram] == names
        assert (loaded.ram[0].memory.view[:4096] == 1).all()
        assert await run_job(monitor, "snapshot-delete", "s") is None
        assert await control.machine.snapshots.list() == []
    async with daemon(tmp_path) as (control, _):
        assert control.guest is not None
        assert control.guest.next_run_state == "running"


async def test_refusals(tmp_path: Path) -> None:
    store_guest(tmp_path)
    async with daemon(tmp_path) as (_, monitor):
        assert await run_job(monitor, "snapshot-save", "s") is None
        for command, tag, node, devices, error in (
            (
                "snapshot-save", "s", "ram-dir", 1,
                "Snapshot 's' already exists in one or more devices",
            ),
            (
                "snapshot-load", "t", "ram-dir", 1,
                "Snapshot 't' does not exist in one or more devices",
            ),
            ("snapshot-save", "t", "disk0", 1, "No block device node 'disk0'"),
            ("snapshot-delete", "t", "disk0", 1, "No block device node 'disk0'"),
            ("snapshot-load", "t", "ram-dir", 0, "At least one device is required for snapshot"),
        ):  # fmt: skip
            assert await run_job(monitor, command, tag, node, devices) == error


async def test_without_a_directory_or_a_guest(tmp_path: Path) -> None:
    async with daemon(None) as (control, monitor):
        assert await run_job(monitor, "snapshot-save", "s") == "No block device node 'ram-dir'"
        assert await control.machine.snapshots.list() == []
    async with daemon(tmp_path) as (_, monitor):
        assert await run_job(monitor, "snapshot-save", "s") == "There is no guest to save"


async def test_not_while_it_migrates(tmp_path: Path) -> None:
    store_guest(tmp_path)
    async with daemon(tmp_path) as (control, monitor):
        assert await run_job(monitor, "snapshot-save", "s") is None
        await ask(monitor, "migrate-set-parameters", max_bandwidth=1)
        assert await ask(monitor, "migrate", uri="exec:cat > /dev/null") == {}
        busy = "There's a migration process in progress"
        assert await run_job(monitor, "snapshot-save", "t") == busy
        assert await run_job(monitor, "snapshot-load", "s") == busy
        assert await ask(monitor, "migrate_cancel") == {}
        await until(lambda: not control.machine.is_migration_yankable, "the cancel")
        await ask(monitor, "migrate-set-parameters", max_bandwidth=0)
        assert await ask(monitor, "migrate", uri="exec:cat > /dev/null") == {}
        await until(lambda: control.run_state == "postmigrate", "the migration")
        gone = "The guest was handed over; cont takes it back"
        assert await run_job(monitor, "snapshot-load", "s") == gone


async def test_a_guest_that_is_being_replaced_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_guest(tmp_path)
    begun, may_go_on = threading.Event(), threading.Event()
    load = Snapshots.load

    def wait_and_load(snapshots: Snapshots, tag: str) -> None:
        begun.set()
        assert may_go_on.wait(30)
        load(snapshots, tag)

    monkeypatch.setattr(Snapshots, "load", wait_and_load)
    async with daemon(tmp_path) as (control, monitor):
        assert await run_job(monitor, "snapshot-save", "s") is None
        held = control.guest
        loading = asyncio.create_task(run_job(monitor, "snapshot-load", "s"))
        await until(begun.is_set, "the job has begun")
        refused = await ask(monitor, "migrate", uri="exec:cat > /dev/null")
        may_go_on.set()
        assert refused == "A snapshot is being loaded"
        assert await loading is None
        assert control.guest is not held
        assert await ask(monitor, "migrate", uri="exec:cat > /dev/null") == {}
        await until(lambda: control.run_state == "postmigrate", "the migration")


async def test_a_guest_whose_devices_are_being_saved_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_guest(tmp_path)
    begun, may_go_on = threading.Event(), threading.Event()

    def wait(_channel: Channel, _data: bytes) -> None:
        begun.set()
        assert may_go_on.wait(30)

    monkeypatch.setattr(Channel, "send", wait)
    async with daemon(tmp_path) as (_, monitor):
        path = str(tmp_path / "devices")
        saving = asyncio.create_task(ask(monitor, "xen-save-devices-state", filename=path))
        await until(begun.is_set, "it is being written")
        refused = await ask(monitor, "migrate", uri="exec:cat > /dev/null")
        may_go_on.set()
        assert refused == "The guest's devices are being saved"
        assert await saving == {}

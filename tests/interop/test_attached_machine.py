"""What a monitor does to a workload besides moving it: reset, power, its devices in a file."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess
from migrationd.daemon.device_file import decode_devices
from tests.support.deadline import until
from tests.support.workloads import compile_counter, needs_scan

pytestmark = [pytest.mark.interop, needs_scan]

UNMIGRATABLE = 'STATE = VMState("dirtier", unmigratable="it is bolted down",'


@contextlib.asynccontextmanager
async def attached(
    directory: Path, *arguments: str, program: Path = PROGRAM, binary: Path | None = None
) -> AsyncIterator[tuple[DaemonProcess, DirtierProcess]]:
    """A workload and its daemon."""
    workload = DirtierProcess(directory, "here", rate_mb_s=200.0, program=program, binary=binary)
    async with contextlib.AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(
            await DaemonProcess.start(arguments=[*workload.daemon_arguments, *arguments])
        )
        await stack.enter_async_context(workload)
        yield daemon, workload


@pytest.fixture
def bolted_down(tmp_path: Path) -> Path:
    """The workload with a device that cannot migrate."""
    program = tmp_path / "bolted.py"
    text = PROGRAM.read_text("utf-8")
    program.write_text(text.replace('STATE = VMState("dirtier",', UNMIGRATABLE))
    return program


async def test_reset_and_powerdown(tmp_path: Path) -> None:
    async with attached(tmp_path) as (daemon, workload):
        await workload.wait_passes(3)
        await daemon.execute("stop")
        await daemon.execute("system_reset")
        assert (await daemon.wait_event("RESET"))["data"] == {
            "guest": False,
            "reason": "host-qmp-system-reset",
        }
        assert await daemon.run_state() == "prelaunch"
        before = workload.progress()
        assert before is not None
        await daemon.execute("cont")
        # It counts from the beginning, in memory that is as at the beginning.
        for _ in range(2):
            now = await workload.wait_running()
            assert now.passes <= before.passes + 1
        assert (await workload.wait_passes(2)).mistakes == 0
        await daemon.execute("system_powerdown")
        await daemon.wait_event("POWERDOWN")
        assert await daemon.run_state() == "running"


async def test_a_program_in_c_is_reset_and_told_to_end(tmp_path: Path) -> None:
    async with attached(tmp_path, binary=compile_counter(tmp_path)) as (daemon, workload):
        await workload.wait_passes(3)
        before = workload.progress()
        assert before is not None
        await daemon.execute("system_reset")
        await daemon.wait_event("RESET")
        assert await daemon.run_state() == "running"
        await until(
            lambda: (workload.progress() or before).passes < before.passes, "it begins anew"
        )
        assert (await workload.wait_passes(1)).mistakes == 0
        await daemon.execute("system_powerdown")
        await daemon.wait_event("POWERDOWN")
        assert await asyncio.wait_for(workload.process.wait(), 10) == 0


async def test_devices_are_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "devices"
    async with attached(tmp_path) as (daemon, workload):
        await workload.wait_passes(2)
        await daemon.execute("xen-save-devices-state", {"filename": str(path)})
        assert await daemon.run_state() == "running"
        with pytest.raises(QMPError, match="Cannot update device state while vm is running"):
            await daemon.execute("xen-load-devices-state", {"filename": str(path)})
        (saved,) = [item for item in decode_devices(path.read_bytes()) if item.idstr == "dirtier"]
        passes = int.from_bytes(saved.body[:8], "big")
        assert passes >= 2
        await workload.wait_passes(2)
        await daemon.execute("stop")
        await daemon.execute("xen-save-devices-state", {"filename": f"{path}.later"})
        await daemon.execute("xen-load-devices-state", {"filename": str(path)})
        await daemon.execute("xen-save-devices-state", {"filename": f"{path}.again"})
        (again,) = [
            item
            for item in decode_devices(Path(f"{path}.again").read_bytes())
            if item.idstr == "dirtier"
        ]
        assert again.body == saved.body
        # Memory went on meanwhile: what belongs to it makes the workload whole again.
        await daemon.execute("xen-load-devices-state", {"filename": f"{path}.later"})
        await daemon.execute("cont")
        assert (await workload.wait_passes(2)).mistakes == 0


async def test_bad_files_of_devices_change_nothing(tmp_path: Path) -> None:
    async with attached(tmp_path, "-S") as (daemon, workload):
        while not await daemon.execute("query-memdev"):
            await asyncio.sleep(0.02)
        whole = tmp_path / "devices"
        await daemon.execute("xen-save-devices-state", {"filename": str(whole)})
        for name, data in (
            ("text", b"root:x:0:0:root\n" * 64),
            ("nothing", b""),
            ("half", whole.read_bytes()[: whole.stat().st_size // 2]),
        ):
            bad = tmp_path / name
            bad.write_bytes(data)
            with pytest.raises(QMPError, match=r"stream|Not a migration|ended"):
                await daemon.execute("xen-load-devices-state", {"filename": str(bad)})
        for name, text in (
            ("/nonexistent", "Could not open '/nonexistent': No such file or directory"),
            (str(tmp_path), "Is a directory|no file of devices"),
        ):
            with pytest.raises(QMPError, match=text):
                await daemon.execute("xen-load-devices-state", {"filename": name})
        with pytest.raises(QMPError, match="Could not create '/nonexistent/x'"):
            await daemon.execute("xen-save-devices-state", {"filename": "/nonexistent/x"})
        await daemon.execute("cont")
        assert (await workload.wait_passes(1)).mistakes == 0


async def test_a_device_that_cannot_migrate_blocks(tmp_path: Path, bolted_down: Path) -> None:
    async with attached(tmp_path, program=bolted_down) as (daemon, workload):
        await workload.wait_running()
        assert await daemon.query("query-migrate") == {
            "blocked-reasons": ["non-migratable device: dirtier"]
        }
        with pytest.raises(QMPError, match="State blocked by non-migratable device 'dirtier'"):
            await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/x"})
        assert "Outgoing migration blocked" in await daemon.execute(
            "human-monitor-command", {"command-line": "info migrate"}
        )
        await workload.wait_running()


async def test_only_migratable(tmp_path: Path, bolted_down: Path) -> None:
    async with attached(tmp_path, "-only-migratable", program=bolted_down) as (daemon, _):
        text = "Device dirtier is not migratable, but --only-migratable was specified"
        await until(lambda: text in daemon.stderr, "the refusal")
        assert await daemon.query("query-memory-size-summary") == {
            "base-memory": 0,
            "plugged-memory": 0,
        }

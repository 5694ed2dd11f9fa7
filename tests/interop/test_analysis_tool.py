"""QEMU's ``analyze-migration.py`` reads what migrationd writes."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.analysis_tool import analyze
from tests.support.results import add_row
from tests.support.workloads import needs_scan

pytestmark = pytest.mark.interop

PROGRAM = """
import sys, time
from types import SimpleNamespace as Object
from migrationd.workload import (
    VMState, Workload, array, boolean, buffer, i32, struct, subsection, u8, u16, u32, u64, varray
)
queue = VMState("queue", fields=(u16("head"), boolean("full")))
state = Object(
    count=7, delta=-2, name=b"abc", ports=[1, 2, 3], used=2, slots=[10, 11],
    queues=[Object(head=5, full=True), Object(head=6, full=False)], alarm=99,
)
workload = Workload("described")
workload.add_block("heap", 1 << 20)[:5] = b"hello"
workload.add_device(
    VMState(
        "device", version_id=3, minimum_version_id=1,
        fields=(
            u64("count"), i32("delta"), buffer("name", 3), array(u8("ports"), 3), u32("used"),
            varray(u32("slots"), "used"), array(struct("queues", queue), 2),
        ),
        subsections=(
            subsection("device/alarm", needed=lambda d: d.alarm, fields=(u64("alarm"),)),
            subsection("device/never", needed=lambda d: False, fields=(u64("alarm"),)),
        ),
    ),
    state,
)
workload.add_device(VMState("second", fields=(u8("used"),)), state)
workload.attach(sys.argv[1])
while True:
    with workload.active():
        pass
    time.sleep(0.01)
"""


def named(found: dict[str, Any]) -> dict[str, Any]:
    """By section name, without the number that tells sections of one name apart."""
    return {name.rpartition(" (")[0]: fields for name, fields in found.items()}


@needs_scan
@pytest.mark.parametrize("form", ["plain", "mapped-ram"])
async def test_it_reads_a_workload(
    tmp_path: Path, form: str, request: pytest.FixtureRequest
) -> None:
    program = tmp_path / "described.py"
    program.write_text(PROGRAM)
    socket, file = tmp_path / "guest", tmp_path / "saved"
    async with contextlib.AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(
            await DaemonProcess.start(arguments=["-guest", f"attach:{socket}"])
        )
        process = await _start(stack, program, socket)
        await daemon.wait_run_state("running")
        await daemon.set_capabilities({"mapped-ram": form == "mapped-ram"})
        await daemon.execute("migrate", {"uri": f"file:{file}"})
        await daemon.wait_migration("completed")
        assert process.returncode is None
    found = analyze(file)
    assert len(named(found)) == len(found) == 5, "every section has an id of its own"
    sections = named(found)
    assert sections["ram"] == {"section sizes": {"heap": "0x0000000000100000"}}
    assert bytes.fromhex(sections["globalstate"]["runstate"])[:8] == b"running\0"
    assert sections["second"] == {"used": "0x02"}
    assert sections["device"] == {
        "count": "0x0000000000000007",
        "delta": "0xfffffffe (-2)",
        "name": "61 62 63",
        "ports": ["0x01", "0x02", "0x03"],
        "used": "0x00000002",
        "slots": ["0x0000000a", "0x0000000b"],
        "queues": [{"head": "0x0005", "full": True}, {"head": "0x0006", "full": False}],
        "device/alarm": {"alarm": "0x0000000000000063"},
    }
    table = "QEMU's analyze-migration.py on a workload's file"
    add_row(request.config, table, (form, str(sections["device"])))


async def test_it_reads_a_parked_guest_in_every_form(
    tmp_path: Path, parked_file: tuple[Path, str, str]
) -> None:
    """A guest's devices are the same in each, whatever else its description has to say."""
    original = named(analyze(parked_file[0]))
    for form in ("mapped-ram", "plain"):
        file = tmp_path / form
        previous = parked_file[0] if form == "mapped-ram" else tmp_path / "mapped-ram"
        uuid = "3ab5ba0a-6e6c-4f2e-8a55-6e2d1c1d0001"
        async with await DaemonProcess.start(incoming="defer", arguments=["-uuid", uuid]) as daemon:
            await daemon.set_capabilities({"mapped-ram": form == "plain"})
            await daemon.execute("migrate-incoming", {"uri": f"file:{previous}"})
            await daemon.wait_migration("completed")
            await daemon.wait_run_state("paused")
            await daemon.set_capabilities(
                {"mapped-ram": form == "mapped-ram", "validate-uuid": True}
            )
            await daemon.execute("migrate", {"uri": f"file:{file}"})
            await daemon.wait_migration("completed")
        assert named(analyze(file)) == original


async def _start(
    stack: contextlib.AsyncExitStack, program: Path, socket: Path
) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(sys.executable, str(program), str(socket))

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    return process

"""The demo itself, and its guest between two QEMUs without us: the measure for everything else."""

import asyncio
import io
import signal

import pytest
from rich.console import Console

from migrationd.ctl.boot_guest import BootGuest, check_run
from migrationd.ctl.demo import DemoPlan, run_demo
from migrationd.ctl.demo_workload import run_workload_demo
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.ctl import start_ctl
from tests.support.releases import qemu_binary
from tests.support.workloads import needs_scan

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_demo_proves_that_nothing_is_lost(machine: str) -> None:
    qemu_binary()
    console = Console(file=io.StringIO(), width=100)
    await run_demo(DemoPlan(machine=machine, bandwidth_bytes_per_s=0, fill_bytes=8 << 20), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Nothing lost:" in text
    for part in ("A → migrationd", "migrationd → B", "downtime", "From A's STOP to B's RESUME"):
        assert part in text


@needs_scan
async def test_demo_without_qemu_moves_a_process() -> None:
    console = Console(file=io.StringIO(), width=100)
    await run_workload_demo(console, 0)
    assert isinstance(console.file, io.StringIO)
    assert "Nothing lost:" in console.file.getvalue()


@pytest.mark.parametrize(
    ("machine", "architecture"), [("pc", "x86_64"), ("q35", "x86_64"), ("virt", "aarch64")]
)
async def test_boot_guest_moves_between_two_qemus(machine: str, architecture: str) -> None:
    binary = qemu_binary(architecture=architecture)
    guest = BootGuest(architecture, counted_pages=512, pages_per_s=20_000, filled_pages=256)
    async with (
        await QemuProcess.start(binary, machine=machine, guest=guest, name="A") as source,
        await QemuProcess.start(
            binary, machine=machine, guest=guest, name="B", incoming="tcp:127.0.0.1:0"
        ) as target,
    ):
        await source.wait_serial(3)
        await source.migrate(await target.listening_uri())
        await source.wait_migration()
        await target.wait_run_state("running")
        await target.wait_serial(3)
        await target.execute("stop")
        memory = await target.pmemsave(guest.counted_address, guest.counted_bytes)
        assert check_run(source.serial + target.serial, memory).passes > 4


@pytest.mark.parametrize(
    "options", [("--fill", "32M"), pytest.param(("--workload",), marks=needs_scan)]
)
async def test_a_demo_that_is_told_to_end_leaves_nothing(options: tuple[str, ...]) -> None:
    if options[0] == "--fill":
        qemu_binary()
    demo = await start_ctl("demo", *options)
    assert demo.stdout is not None
    async with asyncio.timeout(60):
        await demo.stdout.readline()
        demo.terminate()
        # It ends when nobody has the pipe any more.
        text = (await demo.stdout.read()).decode()
        assert await demo.wait() == 128 + signal.SIGTERM
    assert "Traceback" not in text

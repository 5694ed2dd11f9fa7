"""Transports that the matrix leaves out: fd:, exec: and file:, in and out."""

import contextlib
import socket
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest, check_run
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.moves import stand_still
from tests.support.releases import qemu_binary

pytestmark = pytest.mark.interop

GUEST = BootGuest(counted_pages=512, pages_per_s=20_000, filled_pages=1024)


@pytest.fixture(
    params=[
        "path",
        *(pytest.param(version, marks=pytest.mark.matrix) for version in ("10.0", "11.1")),
    ]
)
def binary(request: pytest.FixtureRequest) -> str:
    return qemu_binary(None if request.param == "path" else request.param)


async def send_over_passed_fd(source: PeerProcess, end: socket.socket) -> None:
    source.qmp.send_fd_scm(end.fileno())
    await source.execute("getfd", {"fdname": "peer"})
    end.close()
    await source.execute("migrate", {"uri": "fd:peer"})
    await source.wait_migration()


async def check_goes_on(letters: str, target: QemuProcess) -> None:
    await target.wait_run_state("running")
    await target.wait_serial(3)
    await target.execute("stop")
    memory = await target.pmemsave(GUEST.counted_address, GUEST.counted_bytes)
    check_run(letters + target.serial, memory)


async def test_fd(binary: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        source = await QemuProcess.start(binary, guest=GUEST, name="A")
        await stack.enter_async_context(source)
        await source.wait_serial(3)
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        daemon = await DaemonProcess.start(incoming=f"fd:{fd}", pass_fds=[fd])
        await stack.enter_async_context(daemon)
        theirs.close()
        was_stopped = await stand_still(source)
        await send_over_passed_fd(source, ours)
        await daemon.wait_migration()
        if was_stopped:
            await daemon.execute("cont")

        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        target = await QemuProcess.start(
            binary, guest=GUEST, name="B", incoming=f"fd:{fd}", pass_fds=[fd]
        )
        await stack.enter_async_context(target)
        theirs.close()
        await send_over_passed_fd(daemon, ours)
        await check_goes_on(source.serial, target)


@pytest.mark.parametrize("kind", ["exec", "file"])
async def test_by_way_of_a_file(binary: str, kind: str, tmp_path: Path) -> None:
    # QEMU 7.2 has no file:, so its side is always a command.
    way_in, way_out = tmp_path / "in", tmp_path / "out"
    incoming = f"exec:cat {way_in}" if kind == "exec" else f"file:{way_in}"
    outgoing = f"exec:cat > {way_out}" if kind == "exec" else f"file:{way_out}"
    async with contextlib.AsyncExitStack() as stack:
        source = await QemuProcess.start(binary, machine="q35", guest=GUEST, name="A")
        await stack.enter_async_context(source)
        await source.wait_serial(3)
        was_stopped = await stand_still(source)
        await source.migrate(f"exec:cat > {way_in}", return_path=False)
        await source.wait_migration()
        daemon = await DaemonProcess.start(incoming=incoming)
        await stack.enter_async_context(daemon)
        await daemon.wait_migration()
        if was_stopped:
            await daemon.execute("cont")
        await daemon.execute("migrate", {"uri": outgoing})
        await daemon.wait_migration()
        target = await QemuProcess.start(
            binary, machine="q35", guest=GUEST, name="B", incoming=f"exec:cat {way_out}"
        )
        await stack.enter_async_context(target)
        await check_goes_on(source.serial, target)

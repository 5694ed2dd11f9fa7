"""A running guest goes over a durable copy: its source dies right after the switchover."""

import asyncio
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.ctl import start_ctl
from tests.support.moves import Host, check_runs_on
from tests.support.releases import qemu_binary, release_cases
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "escrow: source -> copy -> destination, source killed behind the switchover"
GUEST = BootGuest(counted_pages=512, filled_pages=16384, pages_per_s=20000)


@pytest.mark.parametrize("version", release_cases())
async def test_the_source_dies_behind_the_switchover(
    version: str, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    host = Host(qemu_binary(version), guest=GUEST, memory_mib=128)
    source = await host.start("QEMU A")
    closing.append(source)
    target = await host.start("QEMU B", incoming="defer")
    closing.append(target)
    daemon = await DaemonProcess.start(
        incoming="defer", arguments=["-ram-dir", str(tmp_path), "-name", "g"]
    )
    closing.append(daemon)
    await source.wait_serial(3)
    # The memory is to follow slowly: the source is gone long before it is there.
    await daemon.set_parameters({"max-postcopy-bandwidth": 32 << 20})
    for peer in (source, target, daemon):
        await peer.qmp.disconnect()
    process = await start_ctl(
        "-s", str(daemon.qmp_path), "escrow", str(source.qmp_path), str(target.qmp_path)
    )
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(60):
        while line := (await process.stdout.readline()).decode():
            text += line
            if "its source may be ended now" in line:
                before = source.serial
                await source.kill()
        code = await process.wait()
    assert code == 0, text
    assert "stood still for" in text
    assert text.splitlines()[-1].startswith("out completed"), text
    qmp = await reconnect(target)
    passes = await check_runs_on(before, qmp, host)
    stood = text.split("stood still for")[1].split("\n")[0].strip()
    add_row(
        request.config,
        TABLE,
        (version, stood, f"yes, {passes} passes"),
        head=("QEMU", "stood still", "goes on"),
    )


async def reconnect(peer: QemuProcess) -> QemuProcess:
    """Take the monitor back."""
    await peer.qmp.connect(str(peer.qmp_path))
    return peer

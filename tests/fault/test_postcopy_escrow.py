"""A guest whose memory follows it out of a file survives the daemon's death."""

import json
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, installed_versions
from tests.support.moves import Host, check_runs_on, parked_guest
from tests.support.peers import Sink
from tests.support.postcopy import recover, send_lazily, start_target, wait_status

pytestmark = pytest.mark.fault

GUEST = BootGuest(counted_pages=2048, filled_pages=8192, pages_per_s=100000)
VERSIONS = [
    pytest.param(version, marks=[pytest.mark.matrix] if number else [])
    for number, version in enumerate(installed_versions())
]
SLOW = {"max-postcopy-bandwidth": 1 << 20}


async def parked_in_file(
    host: Host, directory: Path, closing: list[object]
) -> tuple[DaemonProcess, QemuProcess]:
    """A daemon that holds a guest in a file, and the QEMU that it came from."""
    source, daemon = await parked_guest(host, directory, closing, arguments=arguments(directory))
    return daemon, source


def arguments(directory: Path) -> list[str]:
    return ["-ram-dir", str(directory / "ram"), "-name", "g"]


def keeping(directory: Path) -> list[str]:
    return [*arguments(directory), "-keep"]


async def leaving(
    daemon: DaemonProcess, host: Host, directory: Path, closing: list[object], *, preempt: bool
) -> QemuProcess:
    """A QEMU that runs the guest while its memory follows slowly."""
    target = await start_target(host, f"unix:{directory}/out", preempt=preempt)
    closing.append(target)
    await send_lazily(daemon, f"unix:{directory}/out", preempt=preempt, parameters=SLOW)
    await daemon.wait_migration("postcopy-active")
    return target


async def go_on(daemon: DaemonProcess, target: QemuProcess, uri: str) -> None:
    """Connect the two again; returns when all memory has followed."""
    await recover(target, uri)
    await daemon.execute("migrate", {"uri": uri, "resume": True})
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")


def recorded(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "ram" / "g.json").read_text()))


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_the_daemon_is_killed_and_goes_on(
    version: str, preempt: bool, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(find_qemu(version) or "", "pc", GUEST, memory_mib=128)
    daemon, source = await parked_in_file(host, tmp_path, closing)
    target = await leaving(daemon, host, tmp_path, closing, preempt=preempt)
    await target.wait_serial(1)
    await daemon.kill()
    await wait_status(target, "postcopy-paused")
    # The mark that the destination runs the guest may not have reached the disk; both are right.
    assert recorded(tmp_path)["owner"] == "handing-over"
    assert recorded(tmp_path)["lazy"] is not None

    daemon = await DaemonProcess.start(arguments=arguments(tmp_path))
    closing.append(daemon)
    info = await daemon.wait_migration("postcopy-paused")
    assert "ended before its memory did" in str(info["error-desc"])
    assert await daemon.run_state() == "finish-migrate"
    with pytest.raises(ExecuteError, match="in progress"):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/elsewhere"})
    await go_on(daemon, target, f"unix:{tmp_path}/again")
    assert recorded(tmp_path)["owner"] == "handed-over"
    assert recorded(tmp_path)["lazy"] is None
    await check_runs_on(source.serial, target, host)


async def test_a_destination_that_runs_the_guest_keeps_it(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    daemon, _ = await parked_in_file(host, tmp_path, closing)
    await leaving(daemon, host, tmp_path, closing, preempt=False)
    with pytest.raises(ExecuteError, match="cannot cancel"):
        await daemon.execute("migrate_cancel")
    await daemon.execute("migrate-pause")
    await daemon.wait_migration("postcopy-paused")
    with pytest.raises(ExecuteError, match="not finalized"):
        await daemon.execute("cont")
    assert recorded(tmp_path)["owner"] == "handing-over"


async def test_a_guest_that_nobody_runs_is_taken_back(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    daemon, source = await parked_in_file(host, tmp_path, closing)
    # Something that takes the package, says nothing and goes away.
    async with Sink(tmp_path / "sink") as sink:
        await send_lazily(daemon, f"unix:{tmp_path}/sink", preempt=False, parameters=SLOW)
        await daemon.wait_migration("postcopy-device")
        while sink.taken_bytes < 1 << 20:
            await daemon.query_migrate()
        await daemon.kill()
    daemon = await DaemonProcess.start(arguments=arguments(tmp_path))
    closing.append(daemon)
    await daemon.wait_migration("postcopy-paused")
    assert recorded(tmp_path)["lazy"] == {"preempt": False, "is_loaded": False}
    await daemon.execute("cont")
    await daemon.wait_migration("failed")
    assert await daemon.run_state() == "paused"
    assert recorded(tmp_path)["owner"] == "held"

    target = await start_target(host, f"unix:{tmp_path}/out", preempt=False)
    closing.append(target)
    await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False)
    await daemon.wait_migration("completed")
    await check_runs_on(source.serial, target, host)


def clone_records(directory: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((directory / "ram").glob("*.clone.*n"))]


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
async def test_a_clone_of_a_template_survives_the_daemon(
    preempt: bool, qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    daemon, source = await parked_in_file(host, tmp_path, closing)
    await daemon.close()
    daemon = await DaemonProcess.start(arguments=keeping(tmp_path))
    closing.append(daemon)
    target = await leaving(daemon, host, tmp_path, closing, preempt=preempt)
    # Another daemon with the template sees that somebody sends this clone.
    other = await DaemonProcess.start(arguments=keeping(tmp_path))
    closing.append(other)
    assert await other.run_state() == "paused"
    await other.close()
    await target.wait_serial(1)
    assert [record["owner"] for record in clone_records(tmp_path)] == ["handing-over"]
    await daemon.kill()
    await wait_status(target, "postcopy-paused")
    assert recorded(tmp_path)["owner"] == "held"

    daemon = await DaemonProcess.start(arguments=keeping(tmp_path))
    closing.append(daemon)
    await daemon.wait_migration("postcopy-paused")
    assert await daemon.run_state() == "finish-migrate"
    await go_on(daemon, target, f"unix:{tmp_path}/again")
    await check_runs_on(source.serial, target, host)
    assert await daemon.run_state() == "paused"
    assert not clone_records(tmp_path)
    assert not list((tmp_path / "ram").glob("*.clone.*"))

    second = await start_target(host, f"unix:{tmp_path}/second", preempt=preempt)
    closing.append(second)
    await send_lazily(daemon, f"unix:{tmp_path}/second", preempt=preempt)
    await daemon.wait_migration("completed")
    await check_runs_on(source.serial, second, host)


async def test_a_clone_whose_destination_is_gone_is_given_up(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    daemon, source = await parked_in_file(host, tmp_path, closing)
    await daemon.close()
    daemon = await DaemonProcess.start(arguments=keeping(tmp_path))
    closing.append(daemon)
    target = await leaving(daemon, host, tmp_path, closing, preempt=False)
    await target.kill()
    await daemon.wait_migration("postcopy-paused")
    await daemon.kill()

    daemon = await DaemonProcess.start(arguments=keeping(tmp_path))
    closing.append(daemon)
    await daemon.wait_migration("postcopy-paused")
    await daemon.execute("cont")
    await daemon.wait_migration("failed")
    assert await daemon.run_state() == "paused"
    assert not clone_records(tmp_path)
    again = await start_target(host, f"unix:{tmp_path}/again", preempt=False)
    closing.append(again)
    await send_lazily(daemon, f"unix:{tmp_path}/again", preempt=False)
    await daemon.wait_migration("completed")
    await check_runs_on(source.serial, again, host)

"""cpr-transfer with a real QEMU on either side: it, migrationd and it again on the same memory."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.cpr import channel, incoming_arguments
from tests.support.deadline import until
from tests.support.moves import SMALL_GUEST, VIRTIO, Host, check_runs_on, memory_digest
from tests.support.releases import qemu_binary

pytestmark = pytest.mark.interop

MEMORY_MIB = 32
SHARED = ("-object", f"memory-backend-memfd,id=ram0,size={MEMORY_MIB}M,share=on", *VIRTIO)


def host(version: str, machine: str, arguments: tuple[str, ...] = SHARED) -> Host:
    """A QEMU whose memory is shared, all of it."""
    options = f"{machine},aux-ram-share=on,memory-backend=ram0"
    return Host(qemu_binary(version), options, SMALL_GUEST, MEMORY_MIB, arguments)


async def hand_over(source: QemuProcess | DaemonProcess, main: Path, cpr: Path) -> None:
    """Start a cpr-transfer."""
    await source.set_capabilities({"events": True, "return-path": True})
    await source.set_parameters({"mode": "cpr-transfer"})
    await source.execute("migrate", {"channels": [channel("main", main), channel("cpr", cpr)]})


async def start_destination(
    where: Host, directory: Path, *, paused: bool
) -> "asyncio.Task[QemuProcess]":
    """Start a QEMU that waits for its memory: its monitor does not answer before that."""
    arguments = (*where.arguments, *incoming_arguments(directory / "cpr.b"))
    there = Host(where.binary, where.machine, where.guest, where.memory_mib, arguments)
    incoming = f"unix:{directory}/main.b"
    start = asyncio.create_task(there.start("QEMU B", incoming=incoming, paused=paused))
    await until(lambda: os.path.exists(directory / "cpr.b"), "QEMU B waits for its memory")
    return start


async def park(
    where: Host, directory: Path, closing: list[object]
) -> tuple[QemuProcess, DaemonProcess]:
    """Move a running guest from a QEMU into migrationd, by cpr-transfer."""
    daemon = await DaemonProcess.start(
        incoming=f"unix:{directory}/main.a", arguments=incoming_arguments(directory / "cpr.a")
    )
    closing.append(daemon)
    qemu = await where.start("QEMU A")
    closing.append(qemu)
    await qemu.wait_serial(4)
    await hand_over(qemu, directory / "main.a", directory / "cpr.a")
    await qemu.wait_migration("completed")
    await daemon.wait_migration("completed")
    await daemon.wait_run_state("paused")
    return qemu, daemon


async def leave_by_descriptors(
    source: QemuProcess, daemon: DaemonProcess, where: Host, directory: Path, closing: list[object]
) -> None:
    """The guest that came from a QEMU, which stands still, goes to another: no page is sent."""
    before = source.serial
    digest = await memory_digest(source, where)
    await source.close()
    start = await start_destination(where, directory, paused=True)
    await hand_over(daemon, directory / "main.b", directory / "cpr.b")
    destination = await start
    closing.append(destination)
    info = await daemon.wait_migration("completed")
    await destination.wait_migration("completed")
    ram = info["ram"]
    assert isinstance(ram, dict)
    assert (ram["normal"], ram["duplicate"]) == (0, 0)
    assert await memory_digest(destination, where) == digest
    await destination.execute("cont")
    await check_runs_on(before, destination, where)


@pytest.mark.parametrize(
    ("version", "machine"),
    [
        pytest.param("10.0", "pc", marks=pytest.mark.matrix),
        pytest.param("10.0", "q35", marks=pytest.mark.matrix),
        ("11.1", "pc"),
        pytest.param("11.1", "q35", marks=pytest.mark.matrix),
    ],
)
async def test_in_and_out_without_a_copy(
    version: str, machine: str, tmp_path: Path, closing: list[object]
) -> None:
    where = host(version, machine)
    source, daemon = await park(where, tmp_path, closing)
    await leave_by_descriptors(source, daemon, where, tmp_path, closing)


@pytest.mark.matrix
async def test_what_came_by_descriptors_leaves_by_a_stream(
    tmp_path: Path, closing: list[object]
) -> None:
    where = host("11.1", "pc")
    source, daemon = await park(where, tmp_path, closing)
    before = source.serial
    digest = await memory_digest(source, where)
    await source.close()
    destination = await where.start("QEMU B", incoming=f"unix:{tmp_path}/main.b", paused=True)
    closing.append(destination)
    await daemon.set_capabilities({"return-path": True})
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/main.b"})
    await daemon.wait_migration("completed")
    assert await memory_digest(destination, where) == digest
    await destination.execute("cont")
    await check_runs_on(before, destination, where)


@pytest.mark.matrix
@pytest.mark.parametrize(("old", "new"), [("10.0", "11.1"), ("11.1", "10.0")])
async def test_from_one_release_to_the_other(
    old: str, new: str, tmp_path: Path, closing: list[object]
) -> None:
    source, daemon = await park(host(old, "pc-i440fx-10.0"), tmp_path, closing)
    before = source.serial
    await source.close()
    there = host(new, "pc-i440fx-10.0")
    start = await start_destination(there, tmp_path, paused=False)
    await hand_over(daemon, tmp_path / "main.b", tmp_path / "cpr.b")
    destination = await start
    closing.append(destination)
    await daemon.wait_migration("completed")
    await check_runs_on(before, destination, there)


async def test_a_destination_that_refuses_leaves_the_guest_here(
    tmp_path: Path, closing: list[object]
) -> None:
    where = host("11.1", "pc")
    source, daemon = await park(where, tmp_path, closing)
    before = source.serial
    await source.close()
    other = Host(where.binary, where.machine, SMALL_GUEST, 32, SHARED[:2])  # no disk, no network
    start = await start_destination(other, tmp_path, paused=False)
    await hand_over(daemon, tmp_path / "main.b", tmp_path / "cpr.b")
    # It ends when it refuses, perhaps before it has a monitor.
    with contextlib.suppress(PeerError):
        async with await start:
            await daemon.wait_migration("failed")
    await daemon.wait_migration("failed")
    assert await daemon.run_state() == "paused"
    (tmp_path / "cpr.b").unlink(missing_ok=True)
    start = await start_destination(where, tmp_path, paused=False)
    await hand_over(daemon, tmp_path / "main.b", tmp_path / "cpr.b")
    destination = await start
    closing.append(destination)
    await daemon.wait_migration("completed")
    await check_runs_on(before, destination, where)


@pytest.mark.matrix
@pytest.mark.parametrize("version", ["10.0", "11.1"])
async def test_a_qemu_whose_memory_is_not_taken_runs_on(
    version: str, tmp_path: Path, closing: list[object]
) -> None:
    where = host(version, "pc")
    arguments = ["-ram-limit", "1M", *incoming_arguments(tmp_path / "cpr")]
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await daemon.execute(
        "migrate-incoming", {"uri": f"unix:{tmp_path}/main", "exit-on-error": False}
    )
    source = await where.start("QEMU A")
    closing.append(source)
    await source.wait_serial(2)
    await hand_over(source, tmp_path / "main", tmp_path / "cpr")
    await daemon.wait_migration("failed")
    await source.wait_migration("failed")
    assert await source.run_state() == "running"
    assert "STOP" not in [event["event"] for event in source.events]
    await source.wait_serial(len(source.serial) + 2)


@pytest.mark.parametrize(
    ("version", "at_rest"),
    [
        ("11.1", False),
        pytest.param("11.1", True, marks=pytest.mark.matrix),
        pytest.param("10.0", False, marks=pytest.mark.matrix),
        pytest.param("10.0", True, marks=pytest.mark.matrix),
    ],
)
async def test_what_came_by_a_stream_leaves_by_descriptors(
    version: str, at_rest: bool, tmp_path: Path, closing: list[object]
) -> None:
    where = host(version, "pc")
    resting = ["-name", "guest", "-ram-dir", str(tmp_path / "rest")] if at_rest else []
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/main.a", arguments=resting)
    closing.append(daemon)
    source = await where.start("QEMU A")
    closing.append(source)
    await source.wait_serial(4)
    await source.execute("migrate", {"uri": f"unix:{tmp_path}/main.a"})
    await source.wait_migration("completed")
    await daemon.wait_migration("completed")
    await leave_by_descriptors(source, daemon, where, tmp_path, closing)
    # The guest is still here, as after any other migration, for whoever knows that it is lost.
    assert await daemon.run_state() == "postmigrate"

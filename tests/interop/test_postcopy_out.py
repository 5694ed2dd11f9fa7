"""A parked guest runs on another QEMU at once, and its memory follows."""

from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.events import statuses
from tests.support.moves import (
    Host,
    check_runs_on,
    incoming_uri,
    memory_digest,
    parked_guest,
    source_uri,
)
from tests.support.postcopy import capabilities, send_lazily, start_target
from tests.support.releases import qemu_binary, release_cases
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "postcopy out of migrationd"
HEAD = ("QEMU", "machine", "channels", "transport", "guest in", "counts on", "requests", "pages")

GUEST = BootGuest(counted_pages=2048, filled_pages=8192, pages_per_s=100000)


@pytest.mark.parametrize(
    ("version", "machine", "channels", "store"),
    release_cases(
        ("pc", "q35"),
        ("plain", "preempt"),
        ("memory", "file"),
        default=lambda machine, _, store: (machine == "pc") == (store == "memory"),
    ),
)
async def test_a_parked_guest_runs_at_once(
    version: str,
    machine: str,
    channels: str,
    store: str,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    host = Host(qemu_binary(version), machine, GUEST, memory_mib=128)
    preempt = channels == "preempt"
    transport = "tcp" if machine == "q35" else "unix"
    arguments = ["-ram-dir", str(tmp_path / "ram"), "-name", "g"] if store == "file" else []
    source, daemon = await parked_guest(host, tmp_path, closing, arguments=arguments)
    before = source.serial

    uri = incoming_uri(transport, tmp_path, "out")
    target = await start_target(host, uri, preempt=preempt)
    closing.append(target)
    uri = await source_uri(target, uri)
    # Slow enough that the guest needs pages before they come by themselves.
    await send_lazily(daemon, uri, preempt=preempt, parameters={"max-postcopy-bandwidth": 4 << 20})
    await target.wait_event("RESUME")
    await daemon.wait_migration("postcopy-active")
    await target.wait_serial(2)
    await daemon.set_parameters({"max-postcopy-bandwidth": 0})
    info = await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    assert statuses(daemon) == [
        "setup", "active", "device", "postcopy-device", "postcopy-active", "completed"
    ]  # fmt: skip
    assert await daemon.run_state() == "postmigrate"
    passes = await check_runs_on(before, target, host, passes=5)
    ram = info["ram"]
    assert isinstance(ram, dict)
    assert ram["postcopy-requests"] > 0
    assert ram["precopy-bytes"] < 1 << 20
    assert ram["postcopy-bytes"] > GUEST.filled_pages * 4096
    row = (f"yes, {passes} passes", str(ram["postcopy-requests"]), str(ram["normal"]))
    add_row(request.config, TABLE, (version, machine, channels, transport, store, *row), head=HEAD)


async def send_and_turn(
    daemon: DaemonProcess, target: QemuProcess, uri: str, counter: str, at_bytes: int
) -> dict[str, int]:
    """Begin a slow precopy, let it turn once a counter is there; returns RAM's, at the end."""
    await daemon.set_parameters({"max-bandwidth": 10 << 20})
    await daemon.execute("migrate", {"uri": uri})
    while True:
        info = await daemon.query_migrate()
        ram = info.get("ram")
        if isinstance(ram, dict) and ram[counter] > at_bytes:
            break
    await daemon.execute("migrate-start-postcopy")
    info = await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    ram = info["ram"]
    assert isinstance(ram, dict)
    return ram


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
async def test_postcopy_in_the_middle_of_precopy(
    preempt: bool, qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    source, daemon = await parked_guest(host, tmp_path, closing)
    before = source.serial
    digest = await memory_digest(source, host)

    uri = f"unix:{tmp_path}/out"
    target = await start_target(host, uri, preempt=preempt, paused=True)
    closing.append(target)
    await daemon.set_capabilities(capabilities(preempt=preempt))
    ram = await send_and_turn(daemon, target, uri, "precopy-bytes", 8 << 20)
    assert ram["precopy-bytes"] > 8 << 20
    assert 1 << 20 < ram["postcopy-bytes"] < 34 << 20
    # A page that was sent twice would have ended the destination.
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    await check_runs_on(before, target, host)


@pytest.mark.matrix
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
async def test_multifd_until_the_switch(
    preempt: bool, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Only QEMU 11.1 takes both; older machine types are refused before a byte is sent."""
    host = Host(qemu_binary("11.1"), "pc", GUEST, memory_mib=128)
    source, daemon = await parked_guest(host, tmp_path, closing)
    before = source.serial
    digest = await memory_digest(source, host)
    uri = f"unix:{tmp_path}/out"
    also = {"multifd": True}
    target = await start_target(host, uri, preempt=preempt, paused=True, also=also)
    closing.append(target)
    await daemon.set_capabilities({**capabilities(preempt=preempt), **also})
    ram = await send_and_turn(daemon, target, uri, "multifd-bytes", 8 << 20)
    assert ram["multifd-bytes"] > 8 << 20
    assert ram["postcopy-bytes"] > 1 << 20
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    passes = await check_runs_on(before, target, host)
    channels = "multifd, preempt" if preempt else "multifd, plain"
    row = (f"yes, {passes} passes", str(ram["postcopy-requests"]), str(ram["normal"]))
    add_row(request.config, TABLE, ("11.1", "pc", channels, "unix", "memory", *row), head=HEAD)

"""A lost connection in postcopy out of the daemon: paused on both ends, resumed, nothing lost."""

from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.events import statuses
from tests.support.moves import Host, check_runs_on, parked_guest
from tests.support.peers import Sink
from tests.support.postcopy import recover, send_lazily, start_target, wait_status
from tests.support.relay import Relay
from tests.support.releases import RELEASES, qemu_binary, release_cases
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "postcopy out of migrationd, connection lost"
HEAD = ("QEMU", "channels", "cut by", "cuts", "counts on")
GUEST = BootGuest(counted_pages=2048, filled_pages=8192, pages_per_s=100000)
CUTS = (12, 40, 300)
"""Bytes of a recovery that pass."""

SLOW = {"max-postcopy-bandwidth": 4 << 20}


def report(config: pytest.Config, row: tuple[str, ...]) -> None:
    add_row(config, TABLE, row, head=HEAD)


async def wait_paused(daemon: DaemonProcess, target: QemuProcess, times: int) -> None:
    """Wait until both ends are paused, for this time."""
    info = await daemon.wait_migration("postcopy-paused")
    assert info["error-desc"]
    await wait_status(target, "postcopy-paused", times)


async def resume(daemon: DaemonProcess, target: QemuProcess, uri: str) -> None:
    await recover(target, uri)
    await daemon.execute("migrate", {"uri": uri, "resume": True})
    await daemon.wait_migration("postcopy-active", "completed")


@pytest.mark.parametrize(
    ("version", "channels", "cut"),
    release_cases(
        ("plain", "preempt"),
        ("source", "target", "network"),
        default=lambda _, cut: cut == "network",
    ),
)
async def test_two_cuts(
    version: str,
    channels: str,
    cut: str,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    host = Host(qemu_binary(version), "pc", GUEST, memory_mib=128)
    preempt = channels == "preempt"
    source, daemon = await parked_guest(host, tmp_path, closing)
    target = await start_target(host, f"unix:{tmp_path}/out", preempt=preempt)
    closing.append(target)
    uri = f"unix:{tmp_path}/out"
    for number in range(3):
        async with Relay(tmp_path / f"relay{number}", Path(uri[5:])) as relay:
            through = relay.uri
            if number == 0:
                await send_lazily(daemon, through, preempt=preempt, parameters=SLOW)
            else:
                await daemon.execute("migrate", {"uri": through, "resume": True})
            await daemon.wait_migration("postcopy-active")
            seen = len(target.serial)
            if number == 2:
                break
            await target.wait_serial(seen + 1)
            if cut == "source":
                await daemon.execute("migrate-pause")
            elif cut == "target":
                await target.qmp.execute("migrate-pause", oob=True)
        await wait_paused(daemon, target, number + 1)
        uri = f"unix:{tmp_path}/out{number}"
        await recover(target, uri)
    # The last relay is gone as well: the paused guest goes on over a direct connection.
    await wait_paused(daemon, target, 3)
    await daemon.set_parameters({"max-postcopy-bandwidth": 0})
    await resume(daemon, target, f"unix:{tmp_path}/last")
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    assert statuses(daemon) == [
        "setup", "active", "device", "postcopy-device", "postcopy-active",
        *("postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active") * 3,
        "completed",
    ]  # fmt: skip
    passes = await check_runs_on(source.serial, target, host)
    report(request.config, (version, channels, cut, "3", f"yes, {passes} passes"))


@pytest.mark.parametrize(
    "version",
    [pytest.param(v, marks=[pytest.mark.matrix] if v != "10.0" else []) for v in RELEASES],
)
async def test_a_resume_that_fails_can_be_tried_again(
    version: str, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_binary(version), "pc", GUEST, memory_mib=128)
    source, daemon = await parked_guest(host, tmp_path, closing)
    target = await start_target(host, f"unix:{tmp_path}/out", preempt=False)
    closing.append(target)
    await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False, parameters=SLOW)
    await daemon.wait_migration("postcopy-active")
    await daemon.execute("migrate-pause")
    await wait_paused(daemon, target, 1)

    # Nobody listens.
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/nobody", "resume": True})
    info = await daemon.wait_migration("postcopy-paused")
    assert "Failed to connect" in str(info["error-desc"])
    # Somebody listens and says nothing; migrate-pause gets out of it.
    async with Sink(tmp_path / "silent"):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/silent", "resume": True})
        await daemon.wait_migration("postcopy-recover")
        with pytest.raises(ExecuteError, match="no paused migration"):
            await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/silent", "resume": True})
        await daemon.execute("migrate-pause")
        await daemon.wait_migration("postcopy-paused")
    # The network breaks while the two agree. (7.2 can end with a segmentation fault there.)
    for paused, cut in enumerate(CUTS if version != "7.2" else ()):
        listening = tmp_path / f"again{cut}"
        await recover(target, f"unix:{listening}")
        async with Relay(tmp_path / f"relay{cut}", listening) as relay:
            relay.cut_after(cut)
            await daemon.execute("migrate", {"uri": relay.uri, "resume": True})
            await wait_paused(daemon, target, paused + 2)
    await daemon.set_parameters({"max-postcopy-bandwidth": 0})
    await resume(daemon, target, f"unix:{tmp_path}/last")
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    await check_runs_on(source.serial, target, host)

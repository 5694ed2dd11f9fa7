"""A postcopy out of the daemon cut at random bytes: one owner, and the guest is never lost."""

import random
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.events import statuses
from tests.support.moves import Host, check_runs_on
from tests.support.parked_file import holder
from tests.support.postcopy import recover, send_lazily, start_target, wait_status
from tests.support.relay import Relay
from tests.support.results import add_row

pytestmark = pytest.mark.fault

TABLE = "postcopy out of migrationd, cut at random bytes"
HEAD = ("cut at", "channels", "daemon then", "QEMU then", "after")
HEAD_BYTES = 60_000
"""About where the package of this guest ends: half of the cuts lie before."""

TOTAL_BYTES = 6 << 20
POINTS = 30


def points() -> list[object]:
    """A few in the default run, all in the full matrix."""
    rng = random.Random(5)
    out: list[object] = []
    for number in range(POINTS):
        limit = HEAD_BYTES if number % 2 else TOTAL_BYTES
        marks = [] if number in (3, 6) else [pytest.mark.matrix]
        preempt = number % 4 > 1
        name = f"{number}-{'preempt' if preempt else 'plain'}"
        out.append(pytest.param(rng.randrange(limit), preempt, marks=marks, id=name))
    return out


@pytest.mark.parametrize(("cut", "preempt"), points())
async def test_cut(
    cut: int,
    preempt: bool,
    qemu_host: Host,
    parked_file: tuple[Path, str, str],
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    daemon = await holder(parked_file[0], closing)
    target = await start_target(qemu_host, f"unix:{tmp_path}/out", preempt=preempt)
    closing.append(target)
    async with Relay(tmp_path / "relay", tmp_path / "out") as relay:
        relay.cut_after(cut)
        await send_lazily(
            daemon, relay.uri, preempt=preempt, parameters={"max-postcopy-bandwidth": 8 << 20}
        )
        info = await daemon.wait_migration("postcopy-paused", "failed", "completed")
    status = str(info["status"])
    other, after = "ended", "sent again"
    if status == "postcopy-paused":
        if await runs_there(target):
            other, after = "postcopy-paused", "resumed"
            await resume(daemon, target, tmp_path)
            await check_runs_on(parked_file[2], target, qemu_host)
        else:
            after = "taken back, sent again"
            await daemon.execute("cont")
            await daemon.wait_migration("failed")
    elif status == "completed":
        other, after = "completed", "nothing"
        await check_runs_on(parked_file[2], target, qemu_host)
    if "sent again" in after:
        assert not await runs_there(target)
        assert await daemon.run_state() == "paused"
        again = await start_target(qemu_host, f"unix:{tmp_path}/again", preempt=preempt)
        closing.append(again)
        await send_lazily(daemon, f"unix:{tmp_path}/again", preempt=preempt)
        await daemon.wait_migration("completed")
        await check_runs_on(parked_file[2], again, qemu_host)
    config = request.config
    channels = "preempt" if preempt else "plain"
    add_row(config, TABLE, (str(cut), channels, status, other, after), head=HEAD)


async def runs_there(target: QemuProcess) -> bool:
    """Whether the destination has the guest, and waits for its memory."""
    if target.returncode is not None:
        return False
    if "postcopy-active" not in statuses(target):
        # QEMU 7.2 ends when it cannot load a guest.
        await target.wait_exit()
        return False
    await wait_status(target, "postcopy-paused")
    return True


async def resume(daemon: DaemonProcess, target: QemuProcess, directory: Path) -> None:
    """Resume over a second network that breaks as well, then over one that holds."""
    await recover(target, f"unix:{directory}/second")
    async with Relay(directory / "relay2", directory / "second") as relay:
        relay.cut_after(100_000)
        await daemon.execute("migrate", {"uri": relay.uri, "resume": True})
        info = await daemon.wait_migration("postcopy-paused", "completed")
    if info["status"] != "completed":
        await wait_status(target, "postcopy-paused", 2)
        await recover(target, f"unix:{directory}/third")
        await daemon.set_parameters({"max-postcopy-bandwidth": 0})
        await daemon.execute("migrate", {"uri": f"unix:{directory}/third", "resume": True})
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")

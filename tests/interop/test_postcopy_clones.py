"""One parked guest feeds many destinations, and each one sooner than the one before."""

import asyncio
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.moves import Host, check_runs_on, parked_guest
from tests.support.postcopy import send_lazily, start_target
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "the same parked guest resumed again, order learned"
GUEST = BootGuest(counted_pages=4096, filled_pages=16384, pages_per_s=100000)
SLOW = {"max-postcopy-bandwidth": 128 << 20}


def keeping(directory: Path) -> list[str]:
    return ["-ram-dir", str(directory / "ram"), "-name", "g", "-keep"]


@pytest.fixture
async def template(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> tuple[Host, QemuProcess, DaemonProcess]:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=256)
    source, daemon = await parked_guest(host, tmp_path, closing, arguments=keeping(tmp_path))
    return host, source, daemon


async def lazily(
    daemon: DaemonProcess, host: Host, uri: str, closing: list[object], *, preempt: bool = False
) -> tuple[QemuProcess, dict[str, object]]:
    target = await start_target(host, uri, preempt=preempt)
    closing.append(target)
    await send_lazily(daemon, uri, preempt=preempt, parameters=SLOW)
    info = await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    ram = info["ram"]
    assert isinstance(ram, dict)
    return target, ram


async def test_several_at_once_over_the_same_file(
    template: tuple[Host, QemuProcess, DaemonProcess], tmp_path: Path, closing: list[object]
) -> None:
    host, source, first = template
    daemons = [first]
    for _ in range(2):
        daemons.append(await DaemonProcess.start(arguments=keeping(tmp_path)))
        closing.append(daemons[-1])
    clones = await asyncio.gather(*(
        lazily(daemon, host, f"unix:{tmp_path}/clone{number}", closing)
        for number, daemon in enumerate(daemons)
    ))  # fmt: skip
    for daemon, (target, _) in zip(daemons, clones, strict=True):
        assert await daemon.run_state() == "paused"
        await check_runs_on(source.serial, target, host)


async def test_the_order_of_requests_is_learned_and_kept(
    template: tuple[Host, QemuProcess, DaemonProcess],
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    host, source, daemon = template
    rows = []
    for number in range(2):
        target, ram = await lazily(daemon, host, f"unix:{tmp_path}/out{number}", closing)
        await check_runs_on(source.serial, target, host)
        rows.append(ram)
        await target.close()
        # What was learned is kept with the guest: another daemon knows it.
        await daemon.quit()
        daemon = await DaemonProcess.start(arguments=keeping(tmp_path))
        closing.append(daemon)
    assert (tmp_path / "ram" / "g.order").exists()
    await daemon.quit()
    daemon = await DaemonProcess.start(arguments=[*keeping(tmp_path), "-learn-order", "off"])
    closing.append(daemon)
    target, ram = await lazily(daemon, host, f"unix:{tmp_path}/out-off", closing)
    await check_runs_on(source.serial, target, host)
    first, second, without = (
        int(row["postcopy-requests"])
        for row in (*rows, ram)  # type: ignore[call-overload]
    )
    config = request.config
    add_row(config, TABLE, ("first", str(first)), head=("run", "requests"))
    add_row(config, TABLE, ("second", str(second)))
    add_row(config, TABLE, ("-learn-order off", str(without)))
    # How many requests it saves depends on how fast the guest is beside the push: the table tells.
    assert min(first, without) > 0

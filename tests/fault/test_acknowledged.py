"""Acknowledged means kept: whatever a source was told, the directory bears out."""

import asyncio
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.parked_file import holder
from tests.support.starting import Ahead

pytestmark = pytest.mark.fault

ROUNDS = 6
SLOW = 1 << 20


def options(directory: Path) -> list[str]:
    return ["-name", "vm1", "-ram-dir", str(directory)]


async def send(source: DaemonProcess, uri: str, max_bandwidth: int = 0) -> None:
    await source.set_parameters({"max-bandwidth": max_bandwidth})
    await source.set_capabilities({"return-path": True})
    await source.execute("migrate", {"uri": uri})


async def test_what_the_source_heard_is_what_a_restart_finds(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    source = await holder(parked_file[0], closing, arguments=["-keep"])
    loop = asyncio.get_running_loop()
    whole_s = 0.0
    outcomes = []
    daemons = Ahead(
        lambda turn: DaemonProcess.start(
            incoming=f"unix:{tmp_path}/{turn}.sock", arguments=options(tmp_path / str(turn))
        ),
        closing,
    )
    for turn in range(ROUNDS + 1):
        uri = f"unix:{tmp_path}/{turn}.sock"
        directory = tmp_path / str(turn)
        daemon = await daemons.take()
        begin_s = loop.time()
        # The second is so slow that it cannot have come, however busy the machine is.
        await send(source, uri, max_bandwidth=SLOW if turn == 1 else 0)
        if turn == 0:
            await source.wait_migration("completed")
            whole_s = loop.time() - begin_s
        elif turn == 1:
            await daemon.wait_migration("active")
        else:
            # From the first bytes to somewhat after the last word.
            await asyncio.sleep(whole_s * 1.2 * turn / ROUNDS)
        await daemon.kill()
        status = (await source.wait_migration("completed", "failed"))["status"]
        again = await DaemonProcess.start(incoming="defer", arguments=options(directory))
        closing.append(again)
        found = await again.run_state() == "paused"
        outcomes.append((status, found))
        if status == "completed":
            assert found, f"round {turn}: the source heard that the guest is kept"
        await again.kill()
    assert outcomes[:2] == [("completed", True), ("failed", False)], outcomes

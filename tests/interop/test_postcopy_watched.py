"""What ``migrationctl watch`` says of a postcopy with a cut and a recovery."""

import asyncio
import re
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.ctl import start_ctl
from tests.support.moves import Host, check_runs_on
from tests.support.postcopy import send_lazily, start_target, wait_status
from tests.support.relay import Relay
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "migrationctl watch: a postcopy, a cut and a recovery"


async def test_watch_says_in_words_what_happens(
    qemu_host: Host,
    parked_file: tuple[Path, str, str],
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    # A second monitor: the first one is the test's.
    monitor = tmp_path / "watched.qmp"
    daemon = await DaemonProcess.start(
        incoming=f"file:{parked_file[0]}",
        arguments=["-qmp", f"unix:{monitor},server=on,wait=off"],
    )
    closing.append(daemon)
    await daemon.wait_run_state("paused")
    # A guest that stands still asks for nothing: the push alone says how long it takes.
    target = await start_target(qemu_host, f"unix:{tmp_path}/out", preempt=False, paused=True)
    closing.append(target)
    slow = {"max-postcopy-bandwidth": 512 << 10}
    async with Relay(tmp_path / "relay", tmp_path / "out") as relay:
        await send_lazily(daemon, relay.uri, preempt=False, parameters=slow)
        await daemon.wait_migration("postcopy-active")
        watch = await start_ctl("-s", str(monitor), "watch")
        assert watch.stdout is not None
        text = (await watch.stdout.readuntil(b"postcopy-active")).decode()
    await daemon.wait_migration("postcopy-paused")
    await wait_status(target, "postcopy-paused")
    text += (await watch.stdout.readuntil(b"postcopy-paused")).decode()
    await target.qmp.execute("migrate-recover", {"uri": f"unix:{tmp_path}/again"}, oob=True)
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/again", "resume": True})
    text += (await watch.stdout.readuntil(b"postcopy-active")).decode()
    await daemon.set_parameters({"max-postcopy-bandwidth": 0})
    await daemon.wait_migration("completed")
    text += (await asyncio.wait_for(watch.stdout.read(), 20)).decode()
    assert await watch.wait() == 0
    await target.execute("cont")
    await check_runs_on(parked_file[2], target, qemu_host)

    lines = text.splitlines()
    words = [re.split(r"[:,]", line)[0] for line in lines]
    assert [word for i, word in enumerate(words) if word not in words[:i]][-1] == "completed"
    assert any("its memory follows" in line for line in lines)
    assert any("the connection is lost and nothing else" in line for line in lines)
    assert words.index("postcopy-paused") < len(words) - 1 - words[::-1].index("postcopy-active")
    for line in ("what it said", *lines):
        add_row(request.config, TABLE, (line,))

"""A workload on its way by postcopy, and everything that can die: who runs the guest then?

Never two. Where nobody can, nobody does: a guest without its memory is no guest.
"""

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.codec.command import encode_command
from migrationd.codec.constants import MIG_CMD_PACKAGED
from migrationd.codec.records import Command
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, Progress
from migrationd.ctl.peer_process import PeerError
from migrationd.workload.client import LOST_STATUS
from tests.interop.test_attached_postcopy import POSTCOPY, begin, relayed
from tests.support.deadline import until
from tests.support.events import statuses
from tests.support.peers import CuttingProxy
from tests.support.workloads import Pair, compile_counter, needs_scan, pair

pytestmark = [pytest.mark.fault, needs_scan]

REST_BYTES_PER_S = 1 << 20
PACKAGE = encode_command(Command(MIG_CMD_PACKAGED, bytes(4)))[:5]
"""How a package begins in the stream; its length follows."""


async def running_there(two: Pair) -> Progress:
    """Get as far as a guest that runs at its destination and lacks most of its memory.

    Returns:
        Where it stopped at its source.
    """
    await two.here.wait_passes(1)
    await begin(two, preempt=False, rest=REST_BYTES_PER_S)
    await two.source.wait_migration("postcopy-active")
    await two.there.wait_running()
    last = two.here.progress()
    assert last is not None
    return last


async def recover(two: Pair, directory: Path, source: DaemonProcess) -> None:
    """Connect the two ends again, and let the rest come."""
    again = directory / "again.sock"
    await two.destination.wait_migration("postcopy-paused")
    await two.destination.execute("migrate-recover", {"uri": f"unix:{again}"})
    await source.set_parameters({"max-postcopy-bandwidth": 0})
    await source.execute("migrate", {"uri": f"unix:{again}", "resume": True})
    await source.wait_migration("completed")
    await two.destination.wait_migration("completed")


async def test_the_workload_dies_at_the_destination(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        last = await running_there(two)
        two.there.process.kill()
        info = await two.destination.wait_migration("failed")
        assert "the workload is gone" in str(info["error-desc"])
        await two.source.wait_migration("postcopy-paused")
        with pytest.raises(ExecuteError, match="not finalized"):
            await two.source.execute("cont")
        assert two.here.progress() == last, "what ran on elsewhere does not run here again"


async def test_the_workload_dies_at_the_source(tmp_path: Path) -> None:
    """It was stopped, and its memory is in the daemon's hands as well: nothing is lost."""
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        await running_there(two)
        two.here.process.kill()
        await two.here.process.wait()
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.source.wait_migration("completed")
        await two.there.wait_passes(2)


async def test_the_daemon_of_a_python_program_dies_at_the_destination(tmp_path: Path) -> None:
    """It may stand still inside a fault, with every thread of it: the kernel ends it."""
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        last = await running_there(two)
        await two.destination.kill()
        assert await asyncio.wait_for(two.there.process.wait(), 20) in (
            -signal.SIGKILL,
            LOST_STATUS,
        )
        await two.source.wait_migration("postcopy-paused")
        assert two.here.progress() == last


async def test_the_daemon_dies_at_the_destination(tmp_path: Path) -> None:
    binary = compile_counter(tmp_path)
    async with pair(tmp_path, binary=binary, incoming=POSTCOPY) as two:
        last = await running_there(two)
        await two.destination.kill()
        assert await two.there.process.wait() == LOST_STATUS
        await two.source.wait_migration("postcopy-paused")
        assert two.here.progress() == last


async def test_a_daemon_that_is_told_to_quit_ends_a_guest_without_memory(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        last = await running_there(two)
        await two.destination.execute("quit")
        assert await two.there.process.wait() in (-signal.SIGKILL, LOST_STATUS)
        await two.source.wait_migration("postcopy-paused")
        assert two.here.progress() == last


async def test_the_daemon_dies_at_the_source(tmp_path: Path) -> None:
    """The workload remembers where it went: the next daemon goes on, and does not run it."""
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        last = await running_there(two)
        await two.source.kill()
        async with await DaemonProcess.start(arguments=two.here.daemon_arguments) as source:
            await source.wait_migration("postcopy-paused")
            assert await source.run_state() == "finish-migrate"
            with pytest.raises(ExecuteError, match="not finalized"):
                await source.execute("cont")
            await recover(two, tmp_path, source)
            assert await source.run_state() == "postmigrate"
        await two.there.wait_passes(2)
        assert two.here.progress() == last


async def test_the_daemon_dies_after_a_precopy(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin()
        await two.source.wait_migration("completed")
        await two.source.kill()
        last = two.here.progress()
        async with await DaemonProcess.start(arguments=two.here.daemon_arguments) as source:
            await source.wait_run_state("postmigrate")
            with pytest.raises(ExecuteError, match="Can't migrate the vm"):
                await source.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
            assert two.here.progress() == last
            await source.execute("cont")
            await two.here.wait_running()
        await two.here.wait_running()


async def test_a_guest_that_does_not_load_goes_on_at_its_source(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    text = PROGRAM.read_text()
    assert 'Workload("dirtier",' in text
    other.write_text(
        text.replace('Workload("dirtier",', 'Workload("dirtier", on_loaded=lambda: 1 / 0,')
    )
    async with pair(tmp_path, there_program=other, incoming=POSTCOPY) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=False, rest=REST_BYTES_PER_S)
        await two.source.wait_migration("failed")
        info = await two.destination.wait_migration("failed")
        assert "ZeroDivisionError" in str(info["error-desc"])
        await two.source.wait_run_state("running")
        await two.here.wait_passes(1)
        assert two.there.progress() is None, "it never ran there"
        assert "RESUME" in [event["event"] for event in two.source.events]


async def test_loading_may_wait_for_pages(tmp_path: Path) -> None:
    """A hook that reads memory, as an index that is built anew does, gets it."""
    other = tmp_path / "other.py"
    text = PROGRAM.read_text()
    assert "on_loaded" not in text
    hook = "lambda: [memory[at] for at in range(0, 16 << 20, 4096)]"
    reading = f'Workload("dirtier", on_loaded={hook},'
    assert 'Workload("dirtier",' in text
    other.write_text(text.replace('Workload("dirtier",', reading))
    async with pair(tmp_path, there_program=other, incoming=POSTCOPY) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=False, rest=8 << 20)
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await two.there.wait_passes(2)
        assert two.here.progress() == last


@pytest.mark.parametrize("cut_after_bytes", [500, 1200, 1600, 40_000])
async def test_the_network_is_cut_around_the_switch(tmp_path: Path, cut_after_bytes: int) -> None:
    """Wherever that is, the guest runs in one place at most, and in one in the end."""
    async with relayed(tmp_path) as (two, network):
        await two.here.wait_passes(1)
        network.cut_after(cut_after_bytes)
        with contextlib.suppress(ExecuteError, PeerError):  # it may be over already
            await begin(two, network.uri, preempt=False, rest=REST_BYTES_PER_S)
        source = await two.source.wait_migration("failed", "postcopy-paused")
        destination = await two.destination.wait_migration("failed", "postcopy-paused")
        if source["status"] == "failed":
            # Before the package was whole there the guest goes on here.
            assert destination["status"] == "failed"
            assert two.there.progress() is None
            await two.source.wait_run_state("running")
            await two.here.wait_passes(1)
            return
        last = two.here.progress()
        if destination["status"] == "failed":
            await two.source.execute("cont")
            await two.here.wait_passes(1)
            assert two.there.progress() is None
        else:
            await recover(two, tmp_path, two.source)
            await two.there.wait_passes(2)
            assert two.here.progress() == last


async def test_the_answer_is_lost(tmp_path: Path) -> None:
    """The source does not know whether the guest runs there: it waits, and does not run it."""
    path = tmp_path / "there.sock"
    async with (
        pair(tmp_path, incoming=POSTCOPY, uri=f"unix:{path}") as two,
        CuttingProxy(
            tmp_path / "net.sock",
            path,
            cut_after_bytes=2 << 20,
            withholds_answers_behind=PACKAGE,
        ) as proxy,
    ):
        await two.here.wait_passes(1)
        await begin(two, f"unix:{tmp_path}/net.sock", preempt=False, rest=8 << 20)
        await two.source.wait_migration("postcopy-paused")
        last = two.here.progress()
        assert proxy.answers
        assert "postcopy-active" not in statuses(two.source)
        await two.destination.wait_run_state("running")
        await recover(two, tmp_path, two.source)
        await two.there.wait_passes(2)
        assert two.here.progress() == last


async def test_taken_back_by_somebody_who_knows(tmp_path: Path) -> None:
    """The destination died with the package on the way: its guest never ran."""
    path = tmp_path / "there.sock"
    async with (
        pair(tmp_path, incoming=POSTCOPY, uri=f"unix:{path}") as two,
        CuttingProxy(
            tmp_path / "net.sock",
            path,
            cut_after_bytes=2 << 20,
            withholds_answers_behind=PACKAGE,
        ),
    ):
        await two.here.wait_passes(1)
        await two.destination.execute("stop")  # so that it does not run there, whatever comes
        await begin(two, f"unix:{tmp_path}/net.sock", preempt=False, rest=8 << 20)
        await two.source.wait_migration("postcopy-paused")
        await two.destination.kill()
        assert two.there.progress() is None
        await two.source.execute("cont")
        await two.source.wait_migration("failed")
        await two.source.wait_run_state("running")
        await two.here.wait_passes(1)


async def test_a_second_migration_waits_for_the_memory_of_the_first(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        await running_there(two)
        with pytest.raises(ExecuteError, match="still on its way here"):
            await two.destination.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.destination.wait_migration("completed")


async def test_it_is_stopped_and_started_without_its_memory(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming=POSTCOPY) as two:
        await running_there(two)
        await two.destination.execute("stop")
        assert await two.destination.run_state() == "paused"
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.destination.wait_migration("completed")
        assert await two.destination.run_state() == "paused"
        before = two.there.progress()
        await two.destination.execute("cont")
        await until(lambda: two.there.progress() != before, "it goes on")
        await two.there.wait_passes(2)

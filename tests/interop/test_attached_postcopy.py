"""Live processes move by postcopy: they run on before their memory has followed."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import DirtierProcess
from tests.support.certificates import make_directory
from tests.support.events import statuses
from tests.support.relay import Relay
from tests.support.stall import wait_stall
from tests.support.workloads import Pair, compile_counter, goes_on, needs_scan, pair

pytestmark = [pytest.mark.interop, needs_scan]

POSTCOPY = {"postcopy-ram": True, "postcopy-blocktime": True}
PREEMPT = POSTCOPY | {"postcopy-preempt": True}


@contextlib.asynccontextmanager
async def relayed(
    directory: Path, *, preempt: bool = False, mib: int = 16, binary: Path | None = None
) -> AsyncIterator[tuple[Pair, Relay]]:
    """A pair that postcopy is possible between, over a network that can be cut."""
    incoming = PREEMPT if preempt else POSTCOPY
    there = directory / "there.sock"
    async with (
        pair(directory, mib=mib, binary=binary, incoming=incoming, uri=f"unix:{there}") as two,
        Relay(directory / "net.sock", there) as network,
    ):
        yield two, network


async def begin(two: Pair, uri: str | None = None, *, preempt: bool, rest: int = 0) -> None:
    """Move most of the memory behind the guest.

    Args:
        two: Both ends.
        uri: Where to, if not to the destination itself.
        preempt: Requested pages have a channel of their own.
        rest: ``max-postcopy-bandwidth``.
    """
    for daemon in (two.source, two.destination):
        await daemon.set_capabilities({"events": True})
    await two.source.set_capabilities({"postcopy-ram": True, "postcopy-preempt": preempt})
    await two.source.set_parameters({"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": rest})
    await two.source.execute("migrate", {"uri": uri or await two.destination.listening_uri()})
    await two.source.wait_migration("active")
    await two.source.execute("migrate-start-postcopy")


@pytest.mark.parametrize("preempt", [False, True])
async def test_it_runs_on_before_its_memory_is_there(tmp_path: Path, preempt: bool) -> None:
    async with pair(tmp_path, incoming=PREEMPT if preempt else POSTCOPY) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=preempt, rest=8 << 20)
        await two.destination.wait_run_state("running")
        assert (await two.destination.query_migrate())["status"] == "postcopy-active"
        await two.there.wait_running()
        last = two.here.progress()
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.source.wait_migration("completed")
        await two.destination.wait_migration("completed")
        await goes_on(two.there, last)
        assert two.here.progress() == last, "the source stands still"
        wanted = ["setup", "active", "postcopy-device", "postcopy-active", "completed"]
        assert [status for status in statuses(two.destination) if status != "setup"] == wanted[1:]
        assert statuses(two.source) == [*wanted[:2], "device", *wanted[2:]]
        info = await two.destination.query_migrate()
        [blocked_ms] = info["postcopy-vcpu-blocktime"]
        assert blocked_ms >= info["postcopy-blocktime"] > 0
        assert sum(info["postcopy-latency-dist"]) > 0
        assert info["postcopy-latency"] > 0
        requests = (await two.source.query_migrate())["ram"]["postcopy-requests"]
        assert requests >= 1


async def test_a_program_in_c_does_so_as_well(tmp_path: Path) -> None:
    binary = compile_counter(tmp_path)
    async with pair(tmp_path, binary=binary, incoming=PREEMPT) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=True)
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert two.here.progress() == last


@pytest.mark.parametrize("preempt", [False, True])
async def test_its_pages_may_be_encrypted(tmp_path: Path, preempt: bool) -> None:
    tls = make_directory(tmp_path / "pki")
    async with pair(tmp_path, incoming=PREEMPT if preempt else POSTCOPY, tls=tls) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=preempt, rest=8 << 20)
        await two.there.wait_running()
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.source.wait_migration("completed")
        await two.destination.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert (await two.source.query_migrate())["ram"]["postcopy-requests"] >= 1


@pytest.mark.parametrize("preempt", [False, True])
async def test_a_cut_network_is_a_pause_and_no_more(tmp_path: Path, preempt: bool) -> None:
    async with relayed(tmp_path, preempt=preempt) as (two, network):
        await two.here.wait_passes(1)
        await begin(two, network.uri, preempt=preempt, rest=2 << 20)
        await two.source.wait_migration("postcopy-active")
        await two.there.wait_running()
        network.cut()
        await two.source.wait_migration("postcopy-paused")
        await two.destination.wait_migration("postcopy-paused")
        last = two.here.progress()
        again = tmp_path / "again.sock"
        await two.destination.execute("migrate-recover", {"uri": f"unix:{again}"})
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.source.execute("migrate", {"uri": f"unix:{again}", "resume": True})
        await two.source.wait_migration("completed")
        await two.there.wait_passes(2)
        assert two.here.progress() == last, "the source stood still all the time"
        assert "postcopy-recover" in statuses(two.destination)


async def test_it_does_not_leave_before_the_destination_agrees(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming=POSTCOPY | {"return-path": True}) as two:
        await two.source.set_capabilities({"return-path": True, "switchover-ack": True})
        await begin(two, preempt=False)
        await wait_stall(two.source, "not acknowledged the switchover")
        assert (await two.source.query_migrate())["status"] == "active"
        await two.here.wait_running()
        await two.source.execute("migrate_cancel")
        await two.source.wait_migration("cancelled")
        await two.here.wait_running()


async def test_it_leaves_once_the_destination_agrees(tmp_path: Path) -> None:
    acknowledging = {"return-path": True, "switchover-ack": True}
    async with pair(tmp_path, incoming=POSTCOPY | acknowledging) as two:
        await two.source.set_capabilities(acknowledging)
        await begin(two, preempt=False)
        await two.source.wait_migration("completed")
        await two.there.wait_passes(1)
        assert "postcopy-active" in statuses(two.source)


async def test_while_it_still_precopies_a_pass_lasts_until_it_was_taken_in(tmp_path: Path) -> None:
    """Else it would stop with what the network has not taken yet in front of it."""
    async with relayed(tmp_path) as (two, network):
        network.hold_answers()
        await two.source.set_capabilities({"postcopy-ram": True})
        await two.source.execute("migrate", {"uri": network.uri})
        await wait_stall(two.source, "does not keep up")
        await two.here.wait_running()
        await two.source.execute("migrate_cancel")
        await two.source.wait_migration("cancelled")
        await two.here.wait_running()


async def test_it_goes_on_to_the_next_host_by_precopy(tmp_path: Path) -> None:
    """Its writes are tracked again once its memory is whole."""
    third = DirtierProcess(tmp_path, "third")
    async with (
        pair(tmp_path, incoming=POSTCOPY) as two,
        await DaemonProcess.start(
            incoming="tcp:127.0.0.1:0", arguments=third.daemon_arguments
        ) as daemon,
        third,
    ):
        await begin(two, preempt=False)
        await two.source.wait_migration("completed")
        await two.destination.wait_migration("completed")
        await two.there.wait_passes(1)
        await two.destination.set_capabilities(dict.fromkeys(POSTCOPY, False))
        await two.destination.execute("migrate", {"uri": await daemon.listening_uri()})
        await two.destination.wait_migration("completed")
        last = two.there.progress()
        await goes_on(third, last)


async def test_multifd_until_the_switch(tmp_path: Path) -> None:
    async with pair(tmp_path, multifd="none", incoming=POSTCOPY) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=False, rest=8 << 20)
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await two.there.wait_passes(2)
        assert two.here.progress() == last
        ram = (await two.source.query_migrate())["ram"]
        assert ram["multifd-bytes"] > 0
        assert ram["postcopy-bytes"] > 0


async def test_a_precopy_that_ends_by_itself_is_one(tmp_path: Path) -> None:
    """With the capability on, and nobody asking for postcopy."""
    async with pair(tmp_path, incoming=PREEMPT) as two:
        await two.here.wait_passes(1)
        await two.source.set_capabilities({"postcopy-ram": True, "postcopy-preempt": True})
        await two.source.execute("migrate", {"uri": await two.destination.listening_uri()})
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await two.there.wait_passes(2)
        assert two.here.progress() == last


async def test_at_once(tmp_path: Path) -> None:
    """Before any of its memory was sent, and with a block that was hardly touched."""
    async with pair(tmp_path, mib=64, incoming=POSTCOPY) as two:
        await two.here.wait_running()
        await two.source.set_capabilities({"postcopy-ram": True})
        await two.source.set_parameters({"max-bandwidth": 1 << 20})
        await two.source.execute("migrate", {"uri": await two.destination.listening_uri()})
        await two.source.execute("migrate-start-postcopy")
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await two.there.wait_passes(2)
        assert two.here.progress() == last

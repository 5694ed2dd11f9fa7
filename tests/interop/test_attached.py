"""Live processes move from one daemon to another while they write their memory."""

import contextlib
import resource
import signal
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess
from tests.support.deadline import until
from tests.support.stall import wait_stall
from tests.support.workloads import compile_counter, goes_on, needs_scan, pair

pytestmark = [pytest.mark.interop, needs_scan]


@pytest.mark.parametrize("return_path", [True, False])
async def test_it_goes_on_where_it_was_and_has_lost_nothing(
    tmp_path: Path, return_path: bool
) -> None:
    async with pair(tmp_path) as two:
        assert await two.source.run_state() == "running"
        before = await two.here.wait_running()
        await two.begin(return_path=return_path)
        await two.source.wait_migration("completed")
        await two.destination.wait_run_state("running")
        last = two.here.progress()
        after = await two.there.wait_passes(2)
        assert last is not None
        assert after.place > last.place >= before.place
        assert two.here.progress() == last, "the source stands still"
        assert await two.source.run_state() == "postmigrate"
        names = [event["event"] for event in two.source.events]
        assert names.count("STOP") == 1
        assert "RESUME" in [event["event"] for event in two.destination.events]
        info = await two.source.query_migrate()
        assert isinstance(info["downtime"], int)
        with pytest.raises(QMPError, match="Can't migrate the vm"):
            await two.source.execute("migrate", {"uri": "tcp:127.0.0.1:1"})


async def test_a_program_in_c_moves_as_well(tmp_path: Path) -> None:
    async with pair(tmp_path, binary=compile_counter(tmp_path)) as two:
        await two.here.wait_passes(1)
        await two.begin()
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert two.here.progress() == last


@pytest.mark.parametrize("method", ["none", "zlib"])
async def test_pass_after_pass_over_multifd(tmp_path: Path, method: str) -> None:
    async with pair(tmp_path, multifd=method) as two:
        await two.here.wait_running()
        await two.begin(max_bandwidth=60 << 20 if method == "none" else 0)
        await two.source.wait_migration("completed")
        await two.destination.wait_run_state("running")
        last = two.here.progress()
        await goes_on(two.there, last)
        ram = (await two.source.query_migrate())["ram"]
        assert isinstance(ram, dict)
        assert ram["multifd-bytes"] > 0
        assert ram["dirty-sync-count"] >= 2


async def test_it_waits_until_the_destination_agrees_to_the_switchover(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(switchover_ack=True)
        await wait_stall(two.source, "not acknowledged the switchover")
        assert await two.source.run_state() == "running"
        await two.source.execute("migrate_cancel")
        await two.source.wait_migration("cancelled")
        await two.here.wait_passes(1)


async def test_with_its_agreement_it_goes_over(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.destination.set_capabilities({"return-path": True, "switchover-ack": True})
        await two.begin(switchover_ack=True)
        await two.source.wait_migration("completed")
        await two.there.wait_passes(2)


async def test_a_daemon_that_keeps_it_at_rest_agrees_as_well(tmp_path: Path) -> None:
    acknowledging = {"return-path": True, "switchover-ack": True}
    async with pair(tmp_path) as two, await DaemonProcess.start(incoming="defer") as shelter:
        await two.here.wait_running()
        for daemon in (two.source, shelter):
            await daemon.set_capabilities(acknowledging | {"events": True})
        await shelter.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        await two.source.execute("migrate", {"uri": await shelter.listening_uri()})
        await two.source.wait_migration("completed")
        await shelter.wait_migration("completed")


async def test_pages_that_were_sent_before_go_as_edits(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_mb_s=120.0) as two:
        await two.here.wait_passes(1)
        await two.source.set_parameters({"downtime-limit": 100})
        # Each page has a new number in it: whole, they would be more than the limit lets by.
        await two.begin(max_bandwidth=30 << 20, xbzrle=True)
        await two.source.wait_migration("completed", timeout_s=40)
        await two.there.wait_passes(2)
        info = await two.source.query_migrate()
        cache = info["xbzrle-cache"]
        assert isinstance(cache, dict)
        assert cache["cache-size"] == 64 << 20
        assert cache["pages"] > 0
        assert cache["bytes"] < cache["pages"] * 100
        assert cache["encoding-rate"] > 20
        assert cache["overflow"] == 0
        text = await two.source.execute(
            "human-monitor-command", {"command-line": "info migrate -a"}
        )
        assert f"pages={cache['pages']}" in str(text)


async def test_a_workload_that_stands_still_arrives_so(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.source.execute("stop")
        assert await two.source.run_state() == "paused"
        await two.begin()
        await two.source.wait_migration("completed")
        await two.destination.wait_run_state("paused")
        assert two.there.progress() is None
        await two.destination.execute("cont")
        await two.there.wait_passes(1)


async def test_a_workload_that_is_let_go_on_while_it_migrates_runs_in_one_place(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as two:
        await two.source.execute("stop")
        await two.begin(max_bandwidth=1 << 20)
        await two.source.wait_migration("active")
        stood_at = two.here.progress()
        await two.source.execute("cont")
        await until(lambda: two.here.progress() != stood_at, "it goes on")
        await two.source.set_parameters({"max-bandwidth": 0})
        await two.source.wait_migration("completed")
        left_at = two.here.progress()
        await two.destination.wait_run_state("running")
        await two.there.wait_passes(1)
        assert two.here.progress() == left_at


async def test_a_workload_that_is_stopped_while_it_migrates_arrives_so(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(max_bandwidth=1 << 20)
        await two.source.wait_migration("active")
        await two.source.execute("stop")
        await two.source.set_parameters({"max-bandwidth": 0})
        await two.source.wait_migration("completed")
        await two.destination.wait_run_state("paused")
        assert two.there.progress() is None
        await two.destination.execute("cont")
        await two.there.wait_passes(1)


async def test_a_cancelled_migration_leaves_it_running(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(max_bandwidth=1 << 20)
        await two.source.wait_migration("active")
        await two.source.execute("migrate_cancel")
        await two.source.wait_migration("cancelled")
        assert await two.source.run_state() == "running"
        await two.here.wait_passes(1)


async def test_a_destination_that_dies_leaves_it_running(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(max_bandwidth=4 << 20)
        await two.source.wait_migration("active")
        await two.destination.kill()
        await two.source.wait_migration("failed")
        assert await two.source.run_state() == "running"
        await two.here.wait_passes(1)


async def test_a_destination_that_hangs_is_told_of_and_can_be_given_up(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.source.set_parameters({"downtime-limit": 0})
        await two.begin(max_bandwidth=60 << 20)

        async def is_explained() -> bool:
            info = await two.source.query_migrate()
            return "does not keep up" in str(info.get("error-desc"))

        async def is_passing() -> bool:
            ram = (await two.source.query_migrate()).get("ram")
            return isinstance(ram, dict) and ram["dirty-sync-count"] > 2

        await until(is_passing, "passes")
        two.destination.send_signal(signal.SIGSTOP)
        try:
            await until(is_explained, "a plain reason")
            await two.source.execute("migrate_cancel")
            await two.source.wait_migration("cancelled")
            assert await two.source.run_state() == "running"
            await two.here.wait_passes(1)
        finally:
            two.destination.send_signal(signal.SIGCONT)


async def test_a_failure_while_it_is_stopped_lets_it_go_on(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(pause_before_switchover=True)
        await two.source.wait_migration("pre-switchover")
        await two.destination.kill()
        await two.source.wait_migration("failed")
        await two.source.wait_run_state("running")
        await two.here.wait_passes(1)


async def test_another_version_is_refused_before_the_source_stops(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(PROGRAM.read_text().replace('u64("at")', 'u32("at")'))
    async with pair(tmp_path, there_program=other) as two:
        await two.begin()
        await two.source.wait_migration("failed")
        info = await two.destination.query_migrate()
        assert "device 'dirtier': field 'at': type uint64 is uint32" in str(info["error-desc"])
        assert "STOP" not in [event["event"] for event in two.source.events]
        await two.here.wait_passes(1)


async def test_a_workload_that_dies_fails_its_migration_only(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.begin(max_bandwidth=1 << 20)
        await two.source.wait_migration("active")
        two.here.process.kill()
        await two.source.wait_migration("failed", timeout_s=30)
        info = await two.source.query_migrate()
        assert "workload" in str(info["error-desc"]) or "PAGEMAP_SCAN" in str(info["error-desc"])
        assert await two.source.run_state() == "prelaunch"


async def test_why_it_does_not_end_is_explained_and_a_higher_limit_helps(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_mb_s=60.0) as two:
        await two.here.wait_passes(1)
        await two.source.set_parameters({"downtime-limit": 50})
        await two.begin(max_bandwidth=20 << 20)

        async def is_explained() -> bool:
            info = await two.source.query_migrate()
            return "raise downtime-limit" in str(info.get("error-desc"))

        await until(is_explained, "a plain reason")
        await two.source.set_parameters({"downtime-limit": 2000})
        await two.source.wait_migration("completed")
        assert "error-desc" not in await two.source.query_migrate()
        await two.there.wait_passes(1)


async def test_a_workload_that_writes_too_much_is_slowed_down(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_mb_s=60.0) as two:
        await two.here.wait_passes(1)
        await two.source.set_parameters(
            {"downtime-limit": 200, "cpu-throttle-initial": 50, "cpu-throttle-increment": 45}
        )
        await two.begin(max_bandwidth=30 << 20, auto_converge=True)

        async def is_throttled() -> bool:
            return "cpu-throttle-percentage" in await two.source.query_migrate()

        await until(is_throttled, "the workload is throttled")
        await two.source.wait_migration("completed", timeout_s=40)
        await two.there.wait_passes(1)


async def test_a_workload_is_kept_below_a_dirty_limit(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_mb_s=200.0) as two:
        await two.here.wait_passes(1)
        assert await two.source.execute("query-vcpu-dirty-limit") == []
        await two.source.execute("set-vcpu-dirty-limit", {"dirty-rate": 40})

        async def limit() -> dict[str, int]:
            [entry] = await two.source.qmp.execute("query-vcpu-dirty-limit")  # type: ignore[misc]
            assert isinstance(entry, dict)
            return entry

        async def is_slow() -> bool:
            return 0 < (await limit())["current-rate"] < 80

        assert (await limit())["limit-rate"] == 40
        await until(is_slow, "less is written")
        with pytest.raises(QMPError, match="incorrect cpu index"):
            await two.source.execute("set-vcpu-dirty-limit", {"dirty-rate": 1, "cpu-index": 3})
        await two.source.execute("cancel-vcpu-dirty-limit")
        assert await two.source.execute("query-vcpu-dirty-limit") == []


@pytest.mark.matrix
async def test_a_dirty_limit_lets_it_over_a_line_that_is_too_thin(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_mb_s=200.0) as two:
        await two.here.wait_passes(1)
        await two.source.set_parameters({"downtime-limit": 200, "vcpu-dirty-limit": 10})
        await two.begin(max_bandwidth=30 << 20, dirty_limit=True)

        async def is_limited() -> bool:
            return "dirty-limit-throttle-time-per-round" in await two.source.query_migrate()

        await until(is_limited, "the workload is kept from writing")
        await two.source.wait_migration("completed", timeout_s=40)
        await two.there.wait_passes(1)


async def test_a_daemon_that_ends_leaves_the_workload_running_for_the_next(
    tmp_path: Path,
) -> None:
    work = DirtierProcess(tmp_path, "work")
    async with await DaemonProcess.start(arguments=work.daemon_arguments) as first, work:
        await work.wait_running()
        await first.wait_run_state("running")
        await first.kill()
        await work.wait_running()
    # A second look at the same socket, after the first daemon left it behind.
    async with work, await DaemonProcess.start(arguments=work.daemon_arguments) as second:
        await second.wait_run_state("running")
        await second.execute("stop")
        assert await second.run_state() == "paused"


async def test_a_guest_that_is_nowhere_else_is_not_emptied(tmp_path: Path) -> None:
    """A supervisor that restarts the destination's daemon, -incoming and all, loses nothing."""
    async with pair(tmp_path) as two:
        await two.begin()
        await two.destination.wait_migration("completed")
        await two.destination.kill()
        before = await two.there.wait_passes(1)
        arguments = two.there.daemon_arguments
        async with await DaemonProcess.start(incoming="defer", arguments=arguments) as wrong:
            await until(lambda: "nowhere else" in wrong.stderr, "the workload is refused")
            assert await wrong.run_state() == "inmigrate"
        async with await DaemonProcess.start(arguments=arguments) as right:
            await right.wait_run_state("running")
            after = await two.there.wait_passes(1)
            assert after.place > before.place
            assert after.mistakes == 0
        # What was handed over may be emptied: the guest comes back to where it was before.
        await two.source.kill()
        arguments = two.here.daemon_arguments
        async with await DaemonProcess.start(incoming="defer", arguments=arguments) as again:
            await until(lambda: "attached" in again.stderr, "the workload is taken")


async def test_through_a_mapped_ram_file(tmp_path: Path) -> None:
    """Saved while it runs, which stops it; loaded into another workload, where it goes on."""
    file = tmp_path / "saved"
    here, there = (DirtierProcess(tmp_path, name) for name in ("here", "there"))
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(
            await DaemonProcess.start(arguments=here.daemon_arguments)
        )
        await stack.enter_async_context(here)
        await here.wait_running()
        await source.set_capabilities({"events": True, "mapped-ram": True})
        await source.execute("migrate", {"uri": f"file:{file}"})
        await source.wait_migration("completed")
        last = here.progress()
        assert last is not None
        destination = await stack.enter_async_context(
            await DaemonProcess.start(incoming="defer", arguments=there.daemon_arguments)
        )
        await stack.enter_async_context(there)
        await destination.set_capabilities({"mapped-ram": True})
        await destination.execute(
            "migrate-incoming", {"uri": f"file:{file}", "exit-on-error": False}
        )
        await destination.wait_migration("completed")
        after = await there.wait_passes(2)
        assert after.place > last.place
        assert after.mistakes == 0


async def test_a_file_that_takes_nothing_more_lets_it_go_on(tmp_path: Path) -> None:
    here = DirtierProcess(tmp_path, "here")
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_running()
        await source.set_capabilities({"events": True, "mapped-ram": True})
        resource.prlimit(source.pid, resource.RLIMIT_FSIZE, (8 << 20, resource.RLIM_INFINITY))
        await source.execute("migrate", {"uri": f"file:{tmp_path}/saved"})
        await source.wait_migration("failed")
        assert "File too large" in str((await source.query_migrate())["error-desc"])
        await source.wait_run_state("running")
        await here.wait_passes(1)

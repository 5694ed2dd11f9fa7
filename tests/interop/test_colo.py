"""Checkpoints of a guest that runs, to a replica that takes over when it is told to."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.boot_guest import check_run
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import DirtierProcess
from migrationd.ctl.qemu_process import find_qemu
from tests.support.deadline import until
from tests.support.events import statuses
from tests.support.moves import Host, send
from tests.support.results import TABLES, add_row
from tests.support.starting import start_both
from tests.support.workloads import needs_scan

pytestmark = pytest.mark.interop

COLO = {"events": True, "return-path": True, "x-colo": True}
TABLE = "COLO with QEMU as primary"


@dataclass(frozen=True, slots=True)
class Replicated:
    """A workload, its daemon, and the daemon with its replica."""

    primary: DaemonProcess
    secondary: DaemonProcess
    work: DirtierProcess

    async def checkpoints(self) -> int:
        """Times that the workload has gone on after one."""
        names = [event["event"] for event in self.primary.events]
        return max(0, names.count("RESUME") - 1)

    async def wait_checkpoints(self, more: int) -> None:
        """Wait for so many more."""
        before = await self.checkpoints()

        async def are_there() -> bool:
            return await self.checkpoints() >= before + more

        await until(are_there, f"{more} checkpoints")


@contextlib.asynccontextmanager
async def replicated(
    directory: Path, delay_ms: int = 50, arguments: Sequence[str] = ()
) -> AsyncIterator[Replicated]:
    work = DirtierProcess(directory, "work", mib=8, rate_mb_s=20.0)
    async with contextlib.AsyncExitStack() as stack:
        primary, secondary = await start_both(
            stack,
            DaemonProcess.start(arguments=work.daemon_arguments),
            DaemonProcess.start(incoming="defer", arguments=arguments),
        )
        for daemon in (primary, secondary):
            await daemon.set_capabilities(COLO)
        await secondary.execute(
            "migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False}
        )
        await stack.enter_async_context(work)
        await work.wait_running()
        await primary.wait_run_state("running")
        await primary.set_parameters({"x-checkpoint-delay": delay_ms})
        await primary.execute("migrate", {"uri": await secondary.listening_uri()})
        await primary.wait_migration("colo")
        await secondary.wait_migration("colo")
        yield Replicated(primary, secondary, work)


async def colo(daemon: DaemonProcess) -> tuple[object, ...]:
    status = await daemon.query("query-colo-status")
    return status["mode"], status["last-mode"], status["reason"]


@needs_scan
async def test_the_replica_starts_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    async with replicated(tmp_path) as pair:
        assert await colo(pair.primary) == ("primary", "none", "none")
        assert await colo(pair.secondary) == ("secondary", "none", "none")
        await pair.wait_checkpoints(3)
        await pair.work.wait_passes(2)
        early = pair.work.progress()
        await pair.wait_checkpoints(2)
        pair.work.process.kill()
        await pair.primary.kill()
        last = pair.work.progress()
        await pair.secondary.wait_event("COLO_EXIT")
        assert await pair.secondary.run_state() == "inmigrate"
        await pair.secondary.execute("x-colo-lost-heartbeat")
        await pair.secondary.wait_migration("completed")
        assert statuses(pair.secondary) == ["setup", "active", "colo", "completed"]
        assert await colo(pair.secondary) == ("none", "secondary", "error")
        after = DirtierProcess(tmp_path, "after", mib=8, rate_mb_s=20.0)
        async with (
            await DaemonProcess.start(
                incoming="tcp:127.0.0.1:0", arguments=after.daemon_arguments
            ) as holder,
            after,
        ):
            await pair.secondary.set_capabilities({"x-colo": False})
            await pair.secondary.execute("migrate", {"uri": await holder.listening_uri()})
            await pair.secondary.wait_migration("completed")
            await holder.wait_run_state("running")
            first = await after.wait_running()
            assert early is not None
            assert last is not None
            assert first.place > early.place, "the replica is not that of the first stream"
            await after.wait_passes(2)


@needs_scan
async def test_it_may_wait_for_its_user_and_for_the_secondary_before_it_begins(
    tmp_path: Path,
) -> None:
    work = DirtierProcess(tmp_path, "work", mib=8, rate_mb_s=20.0)
    chosen = COLO | {"switchover-ack": True}
    async with (
        await DaemonProcess.start(arguments=work.daemon_arguments) as primary,
        await DaemonProcess.start(incoming="defer") as secondary,
        work,
    ):
        await secondary.set_capabilities(chosen)
        await secondary.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        await work.wait_running()
        await primary.wait_run_state("running")
        await primary.set_capabilities(chosen | {"pause-before-switchover": True})
        await primary.set_parameters({"x-checkpoint-delay": 50})
        await primary.execute("migrate", {"uri": await secondary.listening_uri()})
        await primary.wait_migration("pre-switchover")
        await primary.execute("migrate-continue", {"state": "pre-switchover"})
        await primary.wait_migration("colo")
        await Replicated(primary, secondary, work).wait_checkpoints(2)
        await primary.execute("x-colo-lost-heartbeat")
        await primary.wait_migration("completed")
        await work.wait_passes(1)


@needs_scan
async def test_with_a_directory_the_replica_rests_there_once_it_has_taken_over(
    tmp_path: Path,
) -> None:
    arguments = ["-name", "guest", "-ram-dir", str(tmp_path / "rest")]
    async with replicated(tmp_path, arguments=arguments) as pair:
        await pair.wait_checkpoints(2)
        await pair.work.wait_passes(1)
        early = pair.work.progress()
        await pair.wait_checkpoints(2)
        pair.work.process.kill()
        await pair.primary.kill()
        last = pair.work.progress()
        await pair.secondary.wait_event("COLO_EXIT")
        assert not (tmp_path / "rest" / "guest.mapped-ram").exists()
        await pair.secondary.execute("x-colo-lost-heartbeat")
        await pair.secondary.wait_migration("completed")
        # It needs no daemon any more.
        await pair.secondary.kill()
    assert early is not None
    assert last is not None
    after = DirtierProcess(tmp_path, "after", mib=8, rate_mb_s=20.0)
    async with (
        await DaemonProcess.start(
            incoming="tcp:127.0.0.1:0", arguments=after.daemon_arguments
        ) as holder,
        after,
        await DaemonProcess.start(arguments=arguments) as found,
    ):
        await found.set_capabilities({"events": True, "return-path": True})
        await found.execute("migrate", {"uri": await holder.listening_uri()})
        await found.wait_migration("completed")
        await holder.wait_run_state("running")
        first = await after.wait_running()
        assert first.place > early.place
        assert (await after.wait_passes(2)).mistakes == 0


@needs_scan
@pytest.mark.parametrize("how", ["told", "killed", "hangs"])
async def test_a_primary_without_its_replica_goes_on(tmp_path: Path, how: str) -> None:
    async with replicated(tmp_path, delay_ms=20) as pair:
        await pair.wait_checkpoints(2)
        if how == "killed":
            await pair.secondary.kill()
        if how == "hangs":
            pair.secondary.send_signal(19)
        if how != "told":
            await pair.primary.wait_event("COLO_EXIT")
            await pair.primary.wait_run_state("running")
            await pair.work.wait_running()
            assert (await pair.primary.query_migrate())["status"] == "colo"
        await pair.primary.execute("x-colo-lost-heartbeat")
        await pair.primary.wait_migration("completed")
        reason = "request" if how == "told" else "error"
        assert await colo(pair.primary) == ("none", "primary", reason)
        assert await pair.primary.run_state() == "running"
        await pair.work.wait_passes(2)
        with pytest.raises(QMPError, match="not in COLO mode"):
            await pair.primary.execute("x-colo-lost-heartbeat")


@needs_scan
async def test_a_cancelled_primary_goes_on(tmp_path: Path) -> None:
    async with replicated(tmp_path, delay_ms=10) as pair:
        await pair.wait_checkpoints(2)
        await pair.primary.execute("migrate_cancel")
        await pair.primary.wait_migration("cancelled")
        await pair.primary.wait_run_state("running")
        await pair.work.wait_passes(1)


@needs_scan
async def test_a_destination_without_the_capability_refuses(tmp_path: Path) -> None:
    work = DirtierProcess(tmp_path, "work", mib=8, rate_mb_s=20.0)
    async with (
        await DaemonProcess.start(arguments=work.daemon_arguments) as primary,
        await DaemonProcess.start(incoming="defer") as secondary,
        work,
    ):
        await secondary.execute(
            "migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False}
        )
        await work.wait_running()
        await primary.wait_run_state("running")
        await primary.set_capabilities(COLO)
        await primary.execute("migrate", {"uri": await secondary.listening_uri()})
        await primary.wait_migration("failed")
        await primary.wait_run_state("running")
        info = await secondary.wait_migration("failed")
        assert "x-colo is off here" in str(info["error-desc"])
        await work.wait_passes(1)


@pytest.mark.skipif(find_qemu("11.1") is None, reason="no QEMU 11.1: tests/support/install-qemus")
async def test_a_replica_of_a_qemu_goes_on_in_another(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With 11.1: others do not get far with a QEMU as their secondary either.

    10.0 takes COLO's first message for one of the return path, and fails. 7.2 hangs behind its
    first checkpoint, whose memory is newer than its processor's state.
    """
    host = Host(str(find_qemu("11.1")))
    uri = f"unix:{tmp_path}/colo"
    async with contextlib.AsyncExitStack() as stack:
        qemu = await stack.enter_async_context(await host.start("QEMU A"))
        secondary = await stack.enter_async_context(await DaemonProcess.start(incoming="defer"))
        await secondary.set_capabilities(COLO)
        await secondary.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        await qemu.wait_serial(2)
        await qemu.set_capabilities(COLO)
        await qemu.set_parameters({"x-checkpoint-delay": 100, "max-bandwidth": 0})
        await qemu.execute("migrate", {"uri": uri})
        await qemu.wait_event("MIGRATION", matching=lambda data: data["status"] == "colo")
        first = qemu.serial
        await qemu.wait_serial(len(first) + 6)
        await asyncio.sleep(0.3)
        await qemu.kill()
        await secondary.wait_event("COLO_EXIT")
        await secondary.execute("x-colo-lost-heartbeat")
        await secondary.wait_migration("completed")
        await secondary.set_capabilities({"x-colo": False})
        there = await stack.enter_async_context(
            await host.start("QEMU B", incoming=f"unix:{tmp_path}/there")
        )
        await send(secondary, there, f"unix:{tmp_path}/there", return_path=True)
        await there.wait_run_state("running")
        # It goes on from a checkpoint: what QEMU A printed after that is printed again.
        await there.wait_serial(3)
        letter = there.serial[0]
        await there.execute("stop")
        memory = await there.pmemsave(host.guest.counted_address, host.guest.counted_bytes)
        printed = qemu.serial
        following = "A" if printed[-1] == "Z" else chr(ord(printed[-1]) + 1)
        before = printed[: (printed + following).rindex(letter)]
        assert len(before) >= len(first) - 1, "the replica is not older than the first stream"
        passes = check_run(before + there.serial, memory).passes
        told = re.findall(r"from checkpoint (\d+)", secondary.stderr)
        row = ("11.1", told[0], qemu.serial[1:], there.serial, f"{passes} passes, none missing")
        if not request.config.stash.get(TABLES, {}).get(TABLE):
            add_row(request.config, TABLE, ("QEMU", "checkpoints", "primary", "replica", ""))
        add_row(request.config, TABLE, row)

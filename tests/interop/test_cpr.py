"""cpr-transfer: a guest goes to another process on this host, its memory by descriptors."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess
from tests.support.cpr import channel, incoming_arguments
from tests.support.ctl import ctl
from tests.support.starting import start_both
from tests.support.workloads import Pair, compile_counter, goes_on

pytestmark = pytest.mark.interop


@contextlib.asynccontextmanager
async def pair(
    directory: Path,
    *,
    mib: int = 16,
    there_program: Path = PROGRAM,
    there_mib: int | None = None,
    binary: Path | None = None,
    huge: tuple[bool, bool] = (False, False),
) -> AsyncIterator[Pair]:
    """Two workloads and their daemons, ready for cpr-transfer."""
    here = DirtierProcess(directory, "here", mib=mib, binary=binary, huge=huge[0])
    there = DirtierProcess(
        directory,
        "there",
        mib=there_mib or mib,
        program=there_program,
        binary=binary,
        huge=huge[1],
    )
    async with contextlib.AsyncExitStack() as stack:
        source, destination = await start_both(
            stack,
            DaemonProcess.start(arguments=here.daemon_arguments),
            DaemonProcess.start(
                incoming="defer",
                arguments=[*there.daemon_arguments, *incoming_arguments(directory / "cpr")],
            ),
        )
        await stack.enter_async_context(here)
        await stack.enter_async_context(there)
        await here.wait_running()
        await source.wait_run_state("running")
        for daemon in (source, destination):
            await daemon.set_capabilities({"events": True})
        await source.set_capabilities({"return-path": True})
        await source.set_parameters({"mode": "cpr-transfer"})
        yield Pair(source, destination, here, there)


async def listen(two: Pair, directory: Path) -> None:
    """Let the destination wait for the source."""
    await two.destination.execute(
        "migrate-incoming", {"uri": f"unix:{directory}/main", "exit-on-error": False}
    )


async def migrate(two: Pair, directory: Path) -> None:
    """Start the migration."""
    channels = [channel("main", directory / "main"), channel("cpr", directory / "cpr")]
    await two.source.execute("migrate", {"channels": channels})


def names(daemon: DaemonProcess) -> list[str]:
    """Events of a daemon, statuses by their name."""
    return [
        str(event["data"]["status"] if event["event"] == "MIGRATION" else event["event"])
        for event in daemon.events
    ]


@pytest.mark.parametrize("return_path", [True, False])
async def test_a_workload_goes_on_in_another_process_and_no_page_is_sent(
    tmp_path: Path, return_path: bool
) -> None:
    async with pair(tmp_path) as two:
        await two.source.set_capabilities({"return-path": return_path})
        await two.here.wait_passes(1)
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        await two.destination.wait_run_state("running")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert two.here.progress() == last, "the source stands still"
        assert names(two.source) == ["setup", "STOP", "active", "device", "completed"]
        assert names(two.destination) == ["setup", "active", "RESUME", "completed"]
        ram = (await two.source.query_migrate())["ram"]
        assert isinstance(ram, dict)
        assert (ram["normal"], ram["duplicate"]) == (0, 0)
        assert ram["transferred"] < 64 << 10
        assert await two.source.run_state() == "postmigrate"


async def test_the_source_cannot_take_it_back(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        with pytest.raises(QMPError, match="memory itself went to the destination"):
            await two.source.execute("cont")
        with pytest.raises(QMPError, match="Can't migrate the vm"):
            await migrate(two, tmp_path)
        await two.there.wait_passes(1)


async def test_a_program_in_c_goes_on_as_well(tmp_path: Path) -> None:
    async with pair(tmp_path, binary=compile_counter(tmp_path)) as two:
        await two.here.wait_passes(1)
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert two.here.progress() == last


async def test_what_came_by_descriptors_leaves_by_precopy(tmp_path: Path) -> None:
    """Its writes are tracked in the memory that it has now."""
    third = DirtierProcess(tmp_path, "third")
    async with pair(tmp_path) as two:
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        await two.there.wait_passes(1)
        async with (
            await DaemonProcess.start(
                incoming="tcp:127.0.0.1:0", arguments=third.daemon_arguments
            ) as last,
            third,
        ):
            await two.destination.set_capabilities({"return-path": True})
            await two.destination.execute("migrate", {"uri": await last.listening_uri()})
            await two.destination.wait_migration("completed")
            await third.wait_passes(2)


async def test_as_a_person_does_it(tmp_path: Path) -> None:
    here, there = DirtierProcess(tmp_path, "here"), DirtierProcess(tmp_path, "there")
    monitor = tmp_path / "qmp"
    cpr = f"cpr,addr.transport=socket,addr.type=unix,addr.path={tmp_path}/cpr"
    async with (
        await DaemonProcess.start(
            arguments=[*here.daemon_arguments, "-qmp", f"unix:{monitor},server=on,wait=off"]
        ) as source,
        await DaemonProcess.start(
            incoming=f"unix:{tmp_path}/main",
            arguments=[*there.daemon_arguments, "-incoming", cpr],
        ),
        here,
        there,
    ):
        await here.wait_passes(1)
        await source.set_capabilities({"return-path": True})
        words = ("-s", str(monitor), "migrate", f"unix:{tmp_path}/main")
        code, text = await ctl(*words, "--cpr", str(tmp_path / "cpr"))
        assert code == 0, text
        await there.wait_passes(1)


@pytest.mark.matrix
@pytest.mark.parametrize("capability", ["multifd", "x-ignore-shared"])
async def test_with_capabilities_that_have_nothing_to_do(tmp_path: Path, capability: str) -> None:
    async with pair(tmp_path) as two:
        for daemon in (two.source, two.destination):
            await daemon.set_capabilities({capability: True})
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        await two.there.wait_passes(1)

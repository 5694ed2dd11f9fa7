"""The state of a live process at one instant, written while it goes on."""

import contextlib
import resource
import signal
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import DirtierProcess, Progress
from migrationd.linux.userfaultfd import can_serve_faults
from tests.support.moves import Host, check_runs_on, memory_digest, move_on, parked_guest
from tests.support.releases import qemu_binary
from tests.support.workloads import compile_counter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not can_serve_faults(), reason="needs Linux 5.19 and a userfaultfd for all faults"
    ),
]

WIDE = pytest.param(True, marks=pytest.mark.matrix)


async def begin(daemon: DaemonProcess, uri: str, bandwidth: int = 0, **capabilities: bool) -> None:
    """Start a snapshot."""
    await daemon.set_capabilities(
        {"events": True, "background-snapshot": True}
        | {name.replace("_", "-"): on for name, on in capabilities.items()}
    )
    await daemon.set_parameters({"max-bandwidth": bandwidth})
    await daemon.execute("migrate", {"uri": uri})


async def restore(directory: Path, name: str, file: Path, *, mapped_ram: bool) -> Progress:
    """Let another workload go on from a snapshot; what it says after two passes of checking."""
    there = DirtierProcess(directory, name, mib=4)
    async with (
        await DaemonProcess.start(incoming="defer", arguments=there.daemon_arguments) as daemon,
        there,
    ):
        await daemon.set_capabilities({"mapped-ram": mapped_ram})
        await daemon.execute("migrate-incoming", {"uri": f"file:{file}", "exit-on-error": False})
        await daemon.wait_migration("completed")
        return await there.wait_passes(2)


@pytest.mark.parametrize("mapped_ram", [False, True])
async def test_it_goes_on_and_what_was_written_goes_on_elsewhere(
    tmp_path: Path, mapped_ram: bool
) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    file = tmp_path / "saved"
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        for _ in range(2):  # the second time nothing is as in the beginning
            before = await here.wait_passes(1)
            await begin(source, f"file:{file}", 8 << 20, mapped_ram=mapped_ram)
            await source.wait_migration("completed")
        after = here.progress()
        assert after is not None
        assert after.passes >= before.passes + 1, "it wrote while it was being saved"
        assert await source.run_state() == "running"
        names = [event["event"] for event in source.events]
        assert [name for name in names if name in ("STOP", "RESUME")] == ["STOP", "RESUME"] * 2
        last = await here.wait_passes(2)
        assert last.mistakes == 0
    found = await restore(tmp_path, "there", file, mapped_ram=mapped_ram)
    assert found.mistakes == 0
    assert found.passes <= last.passes + 2


async def test_over_a_socket_into_another_workload(tmp_path: Path) -> None:
    """A destination of its own runs on from the same instant: the state is a copy."""
    here, there = (DirtierProcess(tmp_path, name, mib=4) for name in ("here", "there"))
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(
            await DaemonProcess.start(arguments=here.daemon_arguments)
        )
        destination = await stack.enter_async_context(
            await DaemonProcess.start(incoming="tcp:127.0.0.1:0", arguments=there.daemon_arguments)
        )
        await stack.enter_async_context(here)
        await stack.enter_async_context(there)
        await here.wait_passes(1)
        await begin(source, await destination.listening_uri())
        await source.wait_migration("completed")
        await destination.wait_run_state("running")
        for work in (here, there):
            assert (await work.wait_passes(2)).mistakes == 0


async def test_one_that_stands_still_stands_still_in_it(tmp_path: Path) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    file = tmp_path / "saved"
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        await source.execute("stop")
        await begin(source, f"file:{file}")
        await source.wait_migration("completed")
        assert await source.run_state() == "paused"
        await source.execute("cont")
        assert (await here.wait_passes(1)).mistakes == 0
    there = DirtierProcess(tmp_path, "there", mib=4)
    async with (
        await DaemonProcess.start(
            incoming=f"file:{file}", arguments=there.daemon_arguments
        ) as daemon,
        there,
    ):
        await daemon.wait_run_state("paused")
        await daemon.execute("cont")
        assert (await there.wait_passes(1)).mistakes == 0


@pytest.mark.parametrize("mapped_ram", [False, WIDE])
async def test_a_cancelled_one_leaves_it_running(tmp_path: Path, mapped_ram: bool) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        await begin(source, f"file:{tmp_path}/saved", 1 << 20, mapped_ram=mapped_ram)
        await source.wait_event("RESUME")
        await source.execute("migrate_cancel")
        await source.wait_migration("cancelled")
        assert await source.run_state() == "running"
        assert (await here.wait_passes(2)).mistakes == 0


@pytest.mark.parametrize("mapped_ram", [False, WIDE])
async def test_a_file_that_takes_nothing_more_leaves_it_running(
    tmp_path: Path, mapped_ram: bool
) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        resource.prlimit(source.pid, resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
        await begin(source, f"file:{tmp_path}/saved", mapped_ram=mapped_ram)
        await source.wait_migration("failed")
        assert "File too large" in str((await source.query_migrate())["error-desc"])
        assert await source.run_state() == "running"
        assert (await here.wait_passes(2)).mistakes == 0


async def test_a_daemon_that_dies_meanwhile_leaves_it_running(tmp_path: Path) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    async with here:
        async with await DaemonProcess.start(arguments=here.daemon_arguments) as source:
            await here.wait_passes(1)
            await begin(source, f"file:{tmp_path}/saved", 1 << 20)
            await source.wait_event("RESUME")
            await source.kill()
        assert (await here.wait_passes(2)).mistakes == 0


async def test_a_workload_that_dies_after_its_instant_is_saved_nevertheless(
    tmp_path: Path,
) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    file = tmp_path / "saved"
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        await begin(source, f"file:{file}", 8 << 20)
        await source.wait_event("RESUME")
        here.process.kill()
        await source.wait_migration("completed")
    assert (await restore(tmp_path, "there", file, mapped_ram=False)).mistakes == 0


@pytest.mark.matrix
async def test_a_workload_that_hangs_fails_it_and_goes_on_later(tmp_path: Path) -> None:
    here = DirtierProcess(tmp_path, "here", mib=4)
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        await here.wait_passes(1)
        here.process.send_signal(signal.SIGSTOP)
        await begin(source, f"file:{tmp_path}/saved")
        await source.wait_migration("failed")
        assert "does not answer" in str((await source.query_migrate())["error-desc"])
        here.process.send_signal(signal.SIGCONT)
        assert (await here.wait_passes(2)).mistakes == 0
        assert await source.run_state() == "running"


async def test_of_a_program_in_c(tmp_path: Path) -> None:
    binary = compile_counter(tmp_path)
    here, there = (DirtierProcess(tmp_path, name, binary=binary) for name in ("here", "there"))
    file = tmp_path / "saved"
    async with await DaemonProcess.start(arguments=here.daemon_arguments) as source, here:
        before = await here.wait_passes(1)
        await begin(source, f"file:{file}")
        await source.wait_migration("completed")
        last = await here.wait_passes(2)
    async with (
        await DaemonProcess.start(
            incoming=f"file:{file}", arguments=there.daemon_arguments
        ) as daemon,
        there,
    ):
        await daemon.wait_run_state("running")
        after = await there.wait_passes(1)
        assert before.place < after.place
        assert after.mistakes == last.mistakes == 0


async def test_a_parked_guest_stays_and_qemu_runs_what_was_written(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    """Twice from one instant: out of the snapshot, and out of the daemon, which still has it."""
    await snapshot_parked(qemu_host, tmp_path, closing, mapped_ram=False)


@pytest.mark.matrix
@pytest.mark.parametrize("mapped_ram", [False, True])
@pytest.mark.parametrize("version", ["10.0", "11.1"])
async def test_newer_qemus_run_it_too(
    version: str, mapped_ram: bool, tmp_path: Path, closing: list[object]
) -> None:
    await snapshot_parked(Host(qemu_binary(version)), tmp_path, closing, mapped_ram=mapped_ram)


async def snapshot_parked(
    qemu_host: Host, tmp_path: Path, closing: list[object], *, mapped_ram: bool
) -> None:
    """Park a guest, save it, and let two QEMUs go on with it."""
    source, daemon = await parked_guest(qemu_host, tmp_path, closing, passes=2)
    printed, digest = source.serial, await memory_digest(source, qemu_host)
    await daemon.set_capabilities({"return-path": False})
    await begin(daemon, f"file:{tmp_path}/saved", mapped_ram=mapped_ram)
    await daemon.wait_migration("completed")
    assert await daemon.run_state() == "paused"
    assert [event["event"] for event in daemon.events].count("STOP") == 0
    restored = await qemu_host.start("QEMU B", incoming="defer", paused=True)
    closing.append(restored)
    if mapped_ram:
        await restored.set_capabilities({"mapped-ram": True})
    saved = f"file:{tmp_path}/saved" if mapped_ram else f"exec:cat {tmp_path}/saved"
    await restored.execute("migrate-incoming", {"uri": saved})
    await restored.wait_migration("completed")
    assert await memory_digest(restored, qemu_host) == digest
    await restored.execute("cont")
    await check_runs_on(printed, restored, qemu_host)

    await daemon.set_capabilities({"background-snapshot": False, "mapped-ram": False})
    found, moved = await move_on(daemon, qemu_host, tmp_path)
    closing.append(moved)
    assert found == digest
    await moved.execute("cont")
    await check_runs_on(printed, moved, qemu_host)

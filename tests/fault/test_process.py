"""The process itself: signals at any time, and nothing left behind after many migrations."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import until
from tests.support.moves import Host, memory_digest, send
from tests.support.peers import CuttingProxy, Sink
from tests.support.resources import children, given_back, held

pytestmark = pytest.mark.fault

HEADER = bytes.fromhex("5145564d 00000003")


@contextlib.asynccontextmanager
async def stalled_reader(path: Path) -> AsyncIterator[None]:
    """A destination that accepts and never reads."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_unix_server(accept, path, limit=1024)
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def holding(file: Path, *arguments: str) -> DaemonProcess:
    daemon = await DaemonProcess.start(incoming=f"file:{file}", arguments=arguments)
    await daemon.wait_run_state("paused")
    await daemon.set_parameters({"max-bandwidth": 0})
    return daemon


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["stalled", "device", "command", "loading", "listening"])
async def test_a_signal_ends_the_process_at_any_moment(
    moment: str,
    number: signal.Signals,
    parked_file: tuple[Path, str, str],
    tmp_path: Path,
    closing: list[object],
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        left: list[int] = []
        if moment in ("loading", "listening"):
            daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
            closing.append(daemon)
            if moment == "loading":
                _, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
                stack.callback(writer.transport.abort)
                writer.write(HEADER)
                await daemon.wait_migration("active")
        else:
            daemon = await holding(parked_file[0])
            closing.append(daemon)
            await daemon.set_capabilities({"return-path": moment != "command"})
            uri = f"unix:{tmp_path}/out.sock"
            if moment == "stalled":
                await stack.enter_async_context(stalled_reader(tmp_path / "out.sock"))
            elif moment == "device":
                await stack.enter_async_context(Sink(tmp_path / "out.sock"))
            else:
                uri = "exec:sleep 1000"
            await daemon.execute("migrate", {"uri": uri})
            await daemon.wait_migration("device" if moment == "device" else "active")
            left = children(daemon.pid)
            assert bool(left) == (moment == "command")
        daemon.send_signal(number)
        assert await daemon.wait_exit() == 0
        assert "Traceback" not in daemon.stderr
        await until(lambda: not any(alive(pid) for pid in left), "no command is left")


async def test_a_signal_ends_a_process_whose_monitor_waits_for_its_first_client(
    tmp_path: Path,
) -> None:
    path = tmp_path / "qmp"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrationd", "-qmp", f"unix:{path},server=on",
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await until(path.exists, "the monitor listens")
    process.terminate()
    _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")
    assert not path.exists()


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def test_shutdown_is_announced(tmp_path: Path, closing: list[object]) -> None:
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    daemon.send_signal(signal.SIGTERM)
    event = await daemon.wait_event("SHUTDOWN")
    assert event["data"] == {"guest": False, "reason": "host-signal"}
    assert await daemon.wait_exit() == 0


async def test_failed_loads_leave_nothing_behind(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    """Forty broken streams: descriptors, threads, children and memory are as after the first."""
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    whole = parked_file[0].read_bytes()
    socket = tmp_path / "in.sock"

    async def break_one(cut: int) -> None:
        await daemon.execute("migrate-incoming", {"uri": f"unix:{socket}", "exit-on-error": False})
        _, writer = await asyncio.open_unix_connection(socket)
        writer.write(whole[:cut])
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()
        await daemon.wait_migration("failed")

    cuts = [len(whole) * (turn + 1) // 42 for turn in range(41)]
    await break_one(cuts[20])
    before, resident = held(daemon.pid), daemon.resident_bytes
    for cut in cuts:
        await break_one(cut)
    await given_back(daemon.pid, before, "all that was taken is given back")
    assert daemon.resident_bytes - resident < 16 << 20


async def test_broken_and_whole_moves_leave_nothing_behind(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = await holding(parked_file[0], "-keep")
    closing.append(daemon)
    await daemon.set_capabilities({"return-path": True})

    async def cycle(turn: int) -> None:
        async with Sink(tmp_path / f"{turn}.sink"):
            await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/{turn}.sink"})
            await daemon.wait_migration("device")
            await daemon.execute("migrate_cancel")
            await daemon.wait_migration("cancelled")
        async with stalled_reader(tmp_path / f"{turn}.stall"):
            await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/{turn}.stall"})
            await daemon.wait_migration("active")
            await daemon.execute("migrate_cancel")
            await daemon.wait_migration("cancelled")
        await daemon.set_capabilities({"return-path": False})
        await daemon.execute("migrate", {"uri": f"exec:cat > {tmp_path}/{turn}.file"})
        await daemon.wait_migration("completed")
        await daemon.execute("migrate", {"uri": "exec:sleep 1000"})
        await daemon.wait_migration("active")
        await daemon.execute("migrate_cancel")
        await daemon.wait_migration("cancelled")
        await daemon.set_capabilities({"return-path": True})

    await cycle(0)
    before, resident = held(daemon.pid), daemon.resident_bytes
    for turn in range(1, 8):
        await cycle(turn)
    await given_back(daemon.pid, before, "all that was taken is given back")
    assert daemon.resident_bytes - resident < 16 << 20
    uri = f"unix:{tmp_path}/last.sock"
    target = await qemu_host.start("QEMU B", incoming=uri, paused=True)
    closing.append(target)
    await send(daemon, target, uri, return_path=True)
    assert await memory_digest(target, qemu_host) == parked_file[1]


async def test_quit_while_a_guest_is_leaving(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    """With -ram-dir the guest is there again after a quit in the middle of a move."""
    options = ["-name", "vm1", "-ram-dir", str(tmp_path / "ram")]
    daemon = await holding(parked_file[0], *options)
    closing.append(daemon)
    await daemon.set_parameters({"max-bandwidth": 1 << 20})
    inner = tmp_path / "b.in"
    victim = await qemu_host.start("QEMU B", incoming=f"unix:{inner}", paused=True)
    closing.append(victim)
    async with CuttingProxy(tmp_path / "b.sock", inner):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/b.sock"})
        await daemon.wait_migration("active")
        assert await daemon.quit() == 0
    again = await DaemonProcess.start(arguments=options)
    closing.append(again)
    assert await again.run_state() == "paused"
    uri = f"unix:{tmp_path}/c.sock"
    target = await qemu_host.start("QEMU C", incoming=uri, paused=True)
    closing.append(target)
    await send(again, target, uri, return_path=True)
    assert await memory_digest(target, qemu_host) == parked_file[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
async def test_a_full_disk_fails_the_load_and_the_source_runs_on(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mounted = await asyncio.create_subprocess_exec(
        "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", full, stderr=asyncio.subprocess.DEVNULL
    )
    if await mounted.wait() != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        daemon = await DaemonProcess.start(
            incoming="defer", arguments=["-name", "vm1", "-ram-dir", str(full)]
        )
        closing.append(daemon)
        source = await qemu_host.start("QEMU A")
        closing.append(source)
        await source.wait_serial(2)
        uri = f"unix:{tmp_path}/in.sock"
        await daemon.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        await source.migrate(uri)
        await source.wait_migration("failed")
        await source.wait_run_state("running")
        info = await daemon.wait_migration("failed")
        assert "No space left on device" in str(info["error-desc"])
        assert await daemon.run_state() == "inmigrate"
        assert not list(full.glob("*.part"))
        assert await daemon.quit() == 0
    finally:
        unmounted = await asyncio.create_subprocess_exec("umount", full)
        await unmounted.wait()

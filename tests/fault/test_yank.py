"""yank: connections that hang are cut off, and everything else goes on."""

import asyncio
import socket
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import until
from tests.support.events import statuses
from tests.support.fake_destination import FakeDestination
from tests.support.moves import Host
from tests.support.parked_file import expect_move
from tests.support.ports import full_backlog
from tests.support.postcopy import send_lazily

pytestmark = pytest.mark.fault

MIGRATION = {"type": "migration"}
SLOW = {"max-postcopy-bandwidth": 1 << 20}
MONITOR = {"type": "chardev", "id": "compat_monitor0"}


async def yank(daemon: DaemonProcess) -> None:
    assert await daemon.execute("query-yank") == [MONITOR, MIGRATION]
    await daemon.execute("yank", {"instances": [MIGRATION]})


async def test_while_active(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = parked[0]
    assert await daemon.execute("query-yank") == [MONITOR]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await daemon.set_parameters({"max-bandwidth": 30000})
        await daemon.execute("migrate", {"uri": f"tcp:127.0.0.1:{listener.getsockname()[1]}"})
        peer, _ = await asyncio.to_thread(listener.accept)
        with peer:
            await daemon.wait_migration("active")
            await yank(daemon)
            await daemon.wait_migration("failed")
    assert statuses(daemon) == ["setup", "active", "failing", "failed"]
    assert await daemon.execute("query-yank") == [MONITOR]
    await daemon.set_parameters({"max-bandwidth": 0})
    await expect_move(*parked, qemu_host, tmp_path, closing)


async def test_while_it_connects(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = parked[0]
    with full_backlog() as address:
        await daemon.execute("migrate", {"uri": f"tcp:{address[0]}:{address[1]}"})
        assert (await daemon.query_migrate())["status"] == "setup"
        await yank(daemon)
        await daemon.wait_migration("failed")
    assert statuses(daemon) == ["setup", "failing", "failed"]
    assert "yank" in str((await daemon.query_migrate())["error-desc"])
    await expect_move(*parked, qemu_host, tmp_path, closing)


async def test_a_paused_postcopy_can_still_be_resumed(
    parked: tuple[DaemonProcess, str, str], tmp_path: Path
) -> None:
    daemon = parked[0]
    async with FakeDestination(tmp_path / "first"):
        await send_lazily(daemon, f"unix:{tmp_path}/first", preempt=False, parameters=SLOW)
        await daemon.wait_migration("postcopy-active")
        await yank(daemon)
        await daemon.wait_migration("postcopy-paused")
    # Nothing is connected that could be cut off.
    await yank(daemon)
    with full_backlog() as address:
        again = {"uri": f"tcp:{address[0]}:{address[1]}", "resume": True}
        await daemon.execute("migrate", again)
        assert (await daemon.query_migrate())["status"] == "postcopy-recover-setup"
        await yank(daemon)
        info = await daemon.wait_migration("postcopy-paused")
    assert "cut off by yank" in str(info["error-desc"])
    async with FakeDestination(tmp_path / "second", is_recovery=True):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/second", "resume": True})
        await daemon.wait_migration("postcopy-recover")


async def test_while_a_guest_arrives(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    path, _, _ = parked_file
    uri = f"unix:{tmp_path}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    # Only listening: there is no connection that could be cut off.
    await yank(daemon)
    assert (await daemon.query_migrate())["status"] == "setup"
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    writer.write(path.read_bytes()[:100_000])
    await daemon.wait_migration("active")
    await yank(daemon)
    await daemon.wait_migration("failed")
    writer.close()
    assert await daemon.execute("query-yank") == [MONITOR]
    assert await daemon.run_state() == "inmigrate"
    await daemon.execute("migrate-incoming", {"uri": f"file:{path}"})
    await daemon.wait_migration("completed")


async def test_a_monitor_cuts_off_another_one(tmp_path: Path, closing: list[object]) -> None:
    path = tmp_path / "second.qmp"
    daemon = await DaemonProcess.start(arguments=["-qmp", f"unix:{path},server=on,wait=off"])
    closing.append(daemon)
    reader, writer = await asyncio.open_unix_connection(str(path))
    await reader.readline()

    async def filenames() -> list[str]:
        found = await daemon.execute("query-chardev")
        assert isinstance(found, list)
        return [item["filename"] for item in found if item["label"] == "compat_monitor1"]

    assert await filenames() == [f"unix:{path},server=on"]
    await daemon.execute("yank", {"instances": [{"type": "chardev", "id": "compat_monitor1"}]})
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()

    async def is_disconnected() -> bool:
        return await filenames() == [f"disconnected:unix:{path},server=on"]

    await until(is_disconnected, "the monitor without a client")
    reader, writer = await asyncio.open_unix_connection(str(path))
    assert b"QMP" in await asyncio.wait_for(reader.readline(), 20)
    writer.close()

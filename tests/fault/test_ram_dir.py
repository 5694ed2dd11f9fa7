"""A guest in ``-ram-dir`` outlives its daemon."""

import asyncio
import json
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError
from tests.support.moves import (
    Host,
    memory_digest,
    move_on,
    parked_guest,
)
from tests.support.parked_file import expect_move, holder

pytestmark = pytest.mark.fault


def options(directory: Path) -> list[str]:
    return ["-name", "vm1", "-ram-dir", str(directory)]


async def test_kill_9_and_restart_give_the_guest_back(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    source, first = await parked_guest(
        qemu_host, tmp_path, closing, arguments=options(tmp_path / "ram")
    )
    digest = await memory_digest(source, qemu_host)
    await first.kill()
    second = await DaemonProcess.start(arguments=options(tmp_path / "ram"))
    closing.append(second)
    assert await second.run_state() == "paused"
    await expect_move(second, digest, source.serial, qemu_host, tmp_path, closing)


async def test_a_daemon_killed_while_loading_offers_nothing(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    uri = f"unix:{tmp_path}/in.sock"
    source = await qemu_host.start("QEMU A")
    closing.append(source)
    first = await DaemonProcess.start(incoming=uri, arguments=options(tmp_path / "ram"))
    closing.append(first)
    await source.wait_serial(1)
    await source.migrate(uri, max_bandwidth=2 << 20)
    await first.wait_migration("active")
    await first.kill()
    await source.wait_migration("failed")
    await source.wait_run_state("running")
    second = await DaemonProcess.start(incoming="defer", arguments=options(tmp_path / "ram"))
    closing.append(second)
    assert await second.run_state() == "inmigrate"
    assert not list((tmp_path / "ram").glob("*.part"))


async def test_handed_over_is_remembered(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    path, digest, _ = parked_file
    first = await holder(path, closing, arguments=options(tmp_path / "ram"))
    _, qemu = await move_on(first, qemu_host, tmp_path)
    closing.append(qemu)
    await first.kill()
    (record,) = (tmp_path / "ram").glob("*.json")
    assert json.loads(record.read_text())["owner"] == "handed-over"
    second = await DaemonProcess.start(arguments=options(tmp_path / "ram"))
    closing.append(second)
    assert await second.run_state() == "postmigrate"
    with pytest.raises(Exception, match="paused due to previous migration"):
        await second.execute("migrate", {"uri": f"unix:{tmp_path}/x.sock"})
    await second.execute("cont")
    arrived, other = await move_on(second, qemu_host, tmp_path)
    closing.append(other)
    assert arrived == digest


async def test_killed_in_the_switchover_needs_the_users_word(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    first = await DaemonProcess.start(
        incoming=f"file:{parked_file[0]}", arguments=options(tmp_path / "ram")
    )
    closing.append(first)
    await first.wait_run_state("paused")
    await first.set_capabilities({"return-path": True})
    await first.set_parameters({"max-bandwidth": 0})

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 20):
            pass
        writer.close()

    async with await asyncio.start_unix_server(swallow, f"{tmp_path}/sink.sock") as server:
        await first.execute("migrate", {"uri": f"unix:{tmp_path}/sink.sock"})
        await first.wait_migration("device")
        await first.kill()
        server.close()
    second = await DaemonProcess.start(arguments=options(tmp_path / "ram"))
    closing.append(second)
    assert await second.run_state() == "postmigrate"
    await second.execute("cont")
    assert await second.run_state() == "paused"


async def test_what_stop_and_cont_chose_is_on_record_when_they_return(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    incoming: str | None = f"file:{parked_file[0]}"
    for command, chosen in (("stop", "paused"), ("cont", "running"), ("stop", "paused")):
        daemon = await DaemonProcess.start(incoming=incoming, arguments=options(tmp_path / "ram"))
        closing.append(daemon)
        await daemon.wait_run_state("paused")
        await daemon.execute(command)
        await daemon.kill()
        incoming = None
        (record,) = (tmp_path / "ram").glob("*.json")
        assert json.loads(record.read_text())["run_state"] == chosen


async def test_a_second_daemon_is_refused(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    first = await DaemonProcess.start(
        incoming=f"file:{parked_file[0]}", arguments=options(tmp_path / "ram")
    )
    closing.append(first)
    await first.wait_run_state("paused")
    with pytest.raises(PeerError, match="vm1"):
        await DaemonProcess.start(arguments=options(tmp_path / "ram"))


async def test_keep_is_a_template(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    path, digest, _ = parked_file
    daemon = await holder(path, closing, arguments=["-keep"])
    for _ in range(3):
        arrived, qemu = await move_on(daemon, qemu_host, tmp_path)
        assert arrived == digest
        assert await daemon.run_state() == "paused"
        await qemu.close()

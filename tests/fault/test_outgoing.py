"""Outgoing migrations that are cancelled or broken: the guest stays whole and moves later."""

import asyncio
import json
import random
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import until
from tests.support.events import statuses
from tests.support.moves import Host, check_runs_on, move_on
from tests.support.parked_file import expect_move, holder
from tests.support.ports import full_backlog
from tests.support.resources import given_back, held
from tests.support.results import add_row
from tests.support.starting import Ahead

pytestmark = pytest.mark.fault

TABLE = "outgoing faults: the parked guest afterwards"
KILL_POINTS = 20


def report(config: pytest.Config, fault: str, status: str, *, moved: bool) -> None:
    add_row(
        config,
        TABLE,
        (fault, status, "yes" if moved else "no"),
        head=("fault", "status", "RAM equal in the next QEMU"),
    )


async def test_cancel_in_setup(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    daemon = parked[0]
    with full_backlog() as address:
        await daemon.execute("migrate", {"uri": f"tcp:{address[0]}:{address[1]}"})
        assert (await daemon.query_migrate())["status"] == "setup"
        await daemon.execute("migrate_cancel")
        await daemon.wait_migration("cancelled")
    assert statuses(daemon) == ["setup", "cancelling", "cancelled"]
    await expect_move(*parked, qemu_host, tmp_path, closing)
    report(request.config, "cancel in setup", "cancelled", moved=True)


async def say_at_once(monitor: Path, commands: Mapping[str, object]) -> None:
    """Send all commands in one piece, and wait until all are answered."""
    said = [{"execute": name, "arguments": given} for name, given in commands.items()]
    reader, writer = await asyncio.open_unix_connection(monitor)
    writer.write(b"".join(json.dumps(value).encode() for value in said))
    answered = 0
    async with asyncio.timeout(30):
        while answered < len(commands):
            answer = json.loads(await reader.readline())
            assert "error" not in answer
            answered += "return" in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [("migrate_cancel", "cancelled", None), ("yank", "failed", "cut off by yank")],
)
async def test_ended_in_the_breath_in_which_it_began(
    command: str,
    status: str,
    text: str | None,
    parked_file: tuple[Path, str, str],
    tmp_path: Path,
    closing: list[object],
) -> None:
    """Both commands are read at once: the migration has no turn in between."""
    path = tmp_path / "qmp"
    monitor = f"unix:{path},server=on,wait=off"
    daemon = await holder(parked_file[0], closing, arguments=["-qmp", monitor])
    end = {"instances": [{"type": "migration"}]} if command == "yank" else {}
    with full_backlog() as address:
        commands = {
            "qmp_capabilities": {},
            "migrate": {"uri": f"tcp:{address[0]}:{address[1]}"},
            command: end,
        }
        await say_at_once(path, commands)
        info = await daemon.wait_migration(status)
    assert text is None or text in str(info["error-desc"])
    assert await daemon.run_state() == "paused"


async def test_cancel_while_active(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    daemon = parked[0]
    uri = f"unix:{tmp_path}/slow.sock"
    target = await qemu_host.start("QEMU", incoming=uri)
    closing.append(target)
    await daemon.set_parameters({"max-bandwidth": 1 << 20})
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("active")
    await daemon.execute("migrate_cancel")
    await daemon.wait_migration("cancelled")
    assert statuses(daemon) == ["setup", "active", "cancelling", "cancelled"]
    await expect_move(*parked, qemu_host, tmp_path, closing)
    report(request.config, "cancel while active", "cancelled", moved=True)


@pytest.mark.parametrize("return_path", [False, True])
async def test_cancel_with_a_peer_that_stopped_reading(
    return_path: bool,
    parked: tuple[DaemonProcess, str, str],
    qemu_host: Host,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    daemon = parked[0]
    await daemon.set_capabilities({"return-path": return_path})
    await daemon.set_parameters({"max-bandwidth": 0})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await daemon.execute("migrate", {"uri": f"tcp:127.0.0.1:{listener.getsockname()[1]}"})
        peer, _ = await asyncio.to_thread(listener.accept)
        with peer:
            sent = -1

            async def stalled() -> bool:
                nonlocal sent
                await asyncio.sleep(0.2)
                ram = (await daemon.query_migrate()).get("ram", {})
                before, sent = sent, ram.get("transferred", 0)  # type: ignore[attr-defined]
                return sent == before

            await until(stalled, "the stream stalls")
            await daemon.execute("migrate_cancel")
            await daemon.wait_migration("cancelled")
    await expect_move(*parked, qemu_host, tmp_path, closing)
    name = "cancel with a stalled peer" + (", return path" if return_path else "")
    report(request.config, name, "cancelled", moved=True)


async def test_cancel_in_pre_switchover(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    daemon = parked[0]
    await daemon.set_capabilities({"pause-before-switchover": True})
    uri = f"unix:{tmp_path}/pause.sock"
    target = await qemu_host.start("QEMU", incoming=uri)
    closing.append(target)
    await daemon.set_parameters({"max-bandwidth": 0})
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("pre-switchover")
    await daemon.execute("migrate_cancel")
    await daemon.wait_migration("cancelled")
    await daemon.set_capabilities({"pause-before-switchover": False})
    await expect_move(*parked, qemu_host, tmp_path, closing)
    report(request.config, "cancel in pre-switchover", "cancelled", moved=True)


async def test_connection_refused(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    daemon = parked[0]
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/nobody.sock"})
    info = await daemon.wait_migration("failed")
    assert "No such file or directory" in str(info["error-desc"])
    assert statuses(daemon) == ["setup", "failing", "failed"]
    await expect_move(*parked, qemu_host, tmp_path, closing)
    report(request.config, "nobody listens", "failed", moved=True)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("garbage", b"\xff" * 64),
        ("SHUT 0 too early", bytes.fromhex("0001 0004 00000000")),
        ("SHUT 1", bytes.fromhex("0001 0004 00000001")),
        ("a page request", bytes.fromhex("0004 000c 0000000000000000 00001000")),
    ],
)
async def test_wrong_answers_on_the_return_path(
    name: str,
    answer: bytes,
    parked: tuple[DaemonProcess, str, str],
    qemu_host: Host,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    daemon = parked[0]
    await daemon.set_capabilities({"return-path": True})
    await daemon.set_parameters({"max-bandwidth": 1 << 20})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        while await reader.read(65536):
            pass
        writer.close()

    async with await asyncio.start_unix_server(serve, f"{tmp_path}/odd.sock") as server:
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/odd.sock"})
        info = await daemon.wait_migration("failed")
        server.close()
    assert info["error-desc"]
    await expect_move(*parked, qemu_host, tmp_path, closing)
    report(request.config, f"return path: {name}", "failed", moved=True)


@pytest.mark.timeout(600)
async def test_destination_killed_at_random_points(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    path, digest, serial = parked_file
    daemon = await holder(path, closing, arguments=["-keep"])
    await daemon.set_capabilities({"return-path": True})
    size = path.stat().st_size
    points = sorted(random.Random(7).sample(range(size), KILL_POINTS))
    victims = Ahead(
        lambda turn: qemu_host.start("victim", incoming=f"unix:{tmp_path}/{turn}.sock"), closing
    )
    for turn, point in enumerate(points):
        uri = f"unix:{tmp_path}/{turn}.sock"
        victim = await victims.take()
        await daemon.set_parameters({"max-bandwidth": 16 << 20})
        await daemon.execute("migrate", {"uri": uri})

        async def reached(point: int = point) -> bool:
            ram = (await daemon.query_migrate()).get("ram", {})
            return ram.get("transferred", 0) >= point  # type: ignore[attr-defined, no-any-return]

        await until(reached, f"{point} bytes sent")
        await victim.kill()
        await daemon.wait_migration("failed", "completed")
        assert await daemon.run_state() == "paused"
        arrived, qemu = await move_on(daemon, qemu_host, tmp_path)
        assert arrived == digest
        await qemu.close()
    report(request.config, f"destination killed at {KILL_POINTS} points", "failed", moved=True)
    _, qemu = await move_on(daemon, qemu_host, tmp_path)
    closing.append(qemu)
    await qemu.execute("cont")
    await check_runs_on(serial, qemu, qemu_host)


async def test_handed_over_once_until_cont_takes_it_back(
    parked: tuple[DaemonProcess, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon, digest, _ = parked
    arrived, first = await move_on(daemon, qemu_host, tmp_path)
    closing.append(first)
    assert arrived == digest
    assert await daemon.run_state() == "postmigrate"
    with pytest.raises(Exception, match="paused due to previous migration"):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/x.sock"})
    await daemon.execute("cont")
    assert await daemon.run_state() == "paused"
    arrived, second = await move_on(daemon, qemu_host, tmp_path)
    closing.append(second)
    assert arrived == digest


async def test_nothing_is_left_behind(
    parked: tuple[DaemonProcess, str, str], tmp_path: Path
) -> None:
    daemon = parked[0]
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/nobody.sock"})
    await daemon.wait_migration("failed")
    before = held(daemon.pid)
    for _ in range(20):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/nobody.sock"})
        await daemon.wait_migration("failed")
        await daemon.execute("migrate", {"uri": "exec:exit 3"})
        await daemon.wait_migration("failed")
    await given_back(daemon.pid, before, "descriptors and threads are back")

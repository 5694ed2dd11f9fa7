"""Connections that break at an exact byte: at most one side holds the guest afterwards."""

import asyncio
import random
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import Host, check_runs_on, memory_digest, move_on, send
from tests.support.parked_file import expect_move, holder
from tests.support.peers import CuttingProxy, Sink
from tests.support.results import add_row
from tests.support.starting import Ahead, start_both

pytestmark = pytest.mark.fault

TABLE = "connections cut at a byte of the stream"
POINTS = 20


def report(config: pytest.Config, *row: str) -> None:
    add_row(config, TABLE, row, head=("way", "points", "outcomes", "afterwards"))


def points(size: int, seed: int) -> list[int]:
    """Bytes at which to cut: anywhere, and often in the device state at the end."""
    rng = random.Random(seed)
    anywhere = rng.sample(range(1, size), POINTS - 6)
    near_the_end = rng.sample(range(size - 40_000, size), 4)
    return [*sorted(anywhere), *sorted(near_the_end), size - 1, size]


def count(outcomes: list[str]) -> str:
    return ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes)))


async def stream_size(daemon: DaemonProcess, directory: Path) -> int:
    """Bytes that this daemon's guest takes on the wire, return path on."""
    async with Sink(directory / "sink.sock") as sink:
        await daemon.execute("migrate", {"uri": f"unix:{directory}/sink.sock"})
        await daemon.wait_migration("device")
        last = -1
        while sink.taken_bytes != last:
            last = sink.taken_bytes
            await asyncio.sleep(0.1)
        await daemon.execute("migrate_cancel")
        await daemon.wait_migration("cancelled")
        return last


@pytest.mark.timeout(600)
async def test_destination_killed_at_exact_bytes(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """The destination dies with so many bytes read; the guest then moves to the next one."""
    path, digest, serial = parked_file
    daemon = await holder(path, closing)
    await daemon.set_capabilities({"return-path": True})
    await daemon.set_parameters({"max-bandwidth": 0})
    size = await stream_size(daemon, tmp_path)
    outcomes = []
    victims = Ahead(
        lambda turn: qemu_host.start(
            "victim", incoming=f"unix:{tmp_path}/{turn}.qemu", paused=True
        ),
        closing,
    )
    for turn, point in enumerate(points(size, 3)):
        inner, outer = tmp_path / f"{turn}.qemu", tmp_path / f"{turn}.sock"
        victim = await victims.take()
        async with CuttingProxy(outer, inner, cut_after_bytes=point, at_cut=victim.kill) as proxy:
            await daemon.execute("migrate", {"uri": f"unix:{outer}"})
            info = await daemon.wait_migration("failed", "completed")
            assert proxy.passed_bytes == point
        await victim.close()
        outcomes.append(str(info["status"]))
        if info["status"] == "completed":
            # The last byte had come, and the destination could say so before it died.
            assert point == size
            assert await daemon.run_state() == "postmigrate"
            await daemon.execute("cont")
        else:
            assert info["error-desc"]
        assert await daemon.run_state() == "paused"
        if turn % 4 == 0:
            arrived, qemu = await move_on(daemon, qemu_host, tmp_path)
            await qemu.close()
            (tmp_path / "onward.sock").unlink(missing_ok=True)
            assert arrived == digest
            assert await daemon.run_state() == "postmigrate"
            await daemon.execute("cont")
    await daemon.execute("stop")
    await expect_move(daemon, digest, serial, qemu_host, tmp_path, closing)
    report(
        request.config, "migrationd -> QEMU, destination killed", str(len(outcomes)),
        count(outcomes), "whole, moved on",
    )  # fmt: skip


@pytest.mark.timeout(600)
async def test_the_way_in_cut_at_exact_bytes(
    qemu_host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """The guest goes on at its source, or is held: never both, never neither."""
    source = await qemu_host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    outcomes = []
    size = 6_400_000
    daemons = Ahead(lambda _: DaemonProcess.start(incoming="defer"), closing)
    for turn, point in enumerate(points(size, 5)):
        inner, outer = tmp_path / f"{turn}.in", tmp_path / f"{turn}.sock"
        daemon = await daemons.take()
        await daemon.execute("migrate-incoming", {"uri": f"unix:{inner}", "exit-on-error": False})
        async with CuttingProxy(outer, inner, cut_after_bytes=point):
            await source.migrate(f"unix:{outer}")
            status = str((await source.wait_migration("failed", "completed"))["status"])
            if status == "failed":
                await daemon.wait_migration("failed")
                assert await daemon.run_state() == "inmigrate"
                # QEMU says failed before it starts its guest again.
                await source.wait_run_state("running")
            else:
                await daemon.wait_migration("completed")
                assert await daemon.run_state() == "paused"
                await source.wait_run_state("postmigrate")
        outcomes.append(status)
        await daemon.close()
        if status == "completed":
            await source.execute("cont")
    await source.wait_serial(len(source.serial) + 2)
    await source.execute("stop")
    await check_runs_on("", source, qemu_host, passes=0)
    report(
        request.config, "QEMU -> migrationd, connection cut", str(len(outcomes)),
        count(outcomes), "runs on at the source",
    )  # fmt: skip


async def test_cut_between_two_daemons_near_the_end(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Device state, EOF and VMDESCRIPTION: a guest is held only when all of it has come."""
    source = await DaemonProcess.start(incoming=f"file:{parked_file[0]}")
    target = await DaemonProcess.start(incoming="defer")
    closing += [source, target]
    await source.wait_run_state("paused")
    await source.set_capabilities({"return-path": True})
    await source.set_parameters({"max-bandwidth": 0})
    size = await stream_size(source, tmp_path)
    rng = random.Random(9)
    cuts = sorted({*rng.sample(range(size - 30_000, size), POINTS - 3), size - 2, size - 1})
    for turn, point in enumerate([*cuts, None]):
        inner, outer = tmp_path / f"{turn}.in", tmp_path / f"{turn}.sock"
        await target.execute("migrate-incoming", {"uri": f"unix:{inner}", "exit-on-error": False})
        async with CuttingProxy(outer, inner, cut_after_bytes=point) as proxy:
            await source.execute("migrate", {"uri": f"unix:{outer}"})
            ends = [await peer.wait_migration("failed", "completed") for peer in (source, target)]
            states = [await peer.run_state() for peer in (source, target)]
            if point is None:
                assert [end["status"] for end in ends] == ["completed", "completed"]
                assert states == ["postmigrate", "paused"]
            else:
                assert proxy.passed_bytes == point
                assert [end["status"] for end in ends] == ["failed", "failed"]
                assert states == ["paused", "inmigrate"]
                assert "position" in str(ends[1]["error-desc"])
    report(
        request.config, "migrationd -> migrationd, connection cut", str(len(cuts) + 1),
        f"1 completed, {len(cuts)} failed", "one owner each time",
    )  # fmt: skip


async def test_the_last_word_is_lost(
    qemu_host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """The whole guest arrives, but SHUT 0 does not: the source runs on, and may send it again."""
    source, daemon = await start_both(
        closing, qemu_host.start("QEMU A"), DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    )
    await source.wait_serial(3)
    proxy = CuttingProxy(
        tmp_path / "out.sock", tmp_path / "in.sock", withholds_answers_behind=b""
    )  # fmt: skip
    async with proxy:
        await source.migrate(f"unix:{tmp_path}/out.sock")
        await daemon.wait_migration("completed")
        assert await source.run_state() in ("running", "finish-migrate")
    await source.wait_migration("failed")
    await source.wait_run_state("running")
    assert await daemon.run_state() == "paused"
    report(
        request.config, "QEMU -> migrationd, SHUT lost", "1", "1 failed at the source",
        "runs on at the source",
    )  # fmt: skip


async def test_a_destination_that_never_confirms(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    """Cancelled in ``device``: the guest is held again and moves."""
    path, digest, serial = parked_file
    daemon = await holder(path, closing)
    await daemon.set_capabilities({"return-path": True})
    await daemon.set_parameters({"max-bandwidth": 0})
    async with Sink(tmp_path / "sink.sock"):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/sink.sock"})
        await daemon.wait_migration("device")
        assert await daemon.run_state() == "finish-migrate"
        await daemon.execute("migrate_cancel")
        await daemon.wait_migration("cancelled")
    assert await daemon.run_state() == "paused"
    await expect_move(daemon, digest, serial, qemu_host, tmp_path, closing)


async def test_both_ends_say_completed_through_a_proxy_that_cuts_nothing(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    """The proxy itself changes nothing."""
    path, digest, _ = parked_file
    daemon = await holder(path, closing)
    target = await qemu_host.start("QEMU B", incoming=f"unix:{tmp_path}/b.in", paused=True)
    closing.append(target)
    async with CuttingProxy(tmp_path / "b.sock", tmp_path / "b.in"):
        await send(daemon, target, f"unix:{tmp_path}/b.sock", return_path=True)
    assert await memory_digest(target, qemu_host) == digest

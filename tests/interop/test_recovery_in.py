"""A QEMU loses its connection in postcopy and comes back: nothing is lost here."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.codec.postcopy import PING_PACKAGE_LOADED
from migrationd.codec.return_path import Pong, encode_return_path
from migrationd.ctl.boot_guest import count_passes
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support import postcopy_in
from tests.support.ctl import ctl
from tests.support.deadline import AT_ONCE_S
from tests.support.events import statuses
from tests.support.moves import Host, move_on
from tests.support.relay import Relay
from tests.support.releases import RELEASES, qemu_binary, release_cases
from tests.support.results import add_row
from tests.support.starting import start_both

pytestmark = pytest.mark.interop

TABLE = "recovery of a postcopy into migrationd"
HEAD = ("QEMU", "preempt", "what happened", "RAM equal", "goes on")
LATE_BYTES_PER_S = 2 << 20
"""Slow enough to be cut in the middle: the guest has some 6 MiB to send."""


def report(request: pytest.FixtureRequest, row: tuple[str, ...]) -> None:
    add_row(request.config, TABLE, row, head=HEAD)


def cases(name: str) -> list[object]:
    """The default run uses the QEMU on the path, with preempt; the rest is the full matrix."""
    preempt = {f"plain-{name}": False, f"preempt-{name}": True}
    return release_cases(preempt, default=lambda preempt: preempt and name != "hang")


class Move:
    """A guest on its way in, over relays that can be cut."""

    source: QemuProcess
    daemon: DaemonProcess

    def __init__(
        self, host: Host, version: str, preempt: bool, directory: Path, closing: list[object]
    ) -> None:
        self.host = host
        self.version = version
        self.preempt = preempt
        self.directory = directory
        self.closing = closing
        self.relays = 0

    async def relay(self) -> Relay:
        """A new path to a new place where the daemon listens."""
        self.relays += 1
        relay = await Relay(
            self.directory / f"r{self.relays}.sock", self.directory / f"d{self.relays}.sock"
        ).start()
        self.closing.append(relay)
        return relay

    async def begin(self, arguments: tuple[str, ...] = ()) -> Relay:
        """Turn to postcopy over the first relay."""
        self.source, self.daemon = await postcopy_in.start_pair(
            self.host, self.closing, arguments=arguments
        )
        relay = await self.relay()
        await postcopy_in.begin(
            self.source,
            self.daemon,
            relay.uri,
            preempt=self.preempt,
            postcopy_bytes_per_s=LATE_BYTES_PER_S,
            listens=f"unix:{self.directory}/d1.sock",
        )
        await self.daemon.wait_migration("postcopy-active")
        # Before, a source of 10.2 and later takes its guest back when the connection is lost.
        await self.source.wait_migration("postcopy-active")
        return relay

    async def come_back(self) -> Relay:
        """Recover over a new relay."""
        relay = await self.relay()
        await postcopy_in.resume(
            self.source, self.daemon, relay.uri, f"unix:{self.directory}/d{self.relays}.sock"
        )
        return relay

    async def finish(self) -> int:
        """Complete, move on to a QEMU and compare; returns the guest's passes."""
        await self.source.set_parameters({"max-postcopy-bandwidth": 0})
        return await postcopy_in.on_to_qemu(
            self.source, self.daemon, self.host, self.directory, self.closing
        )


def move(version: str, preempt: bool, directory: Path, closing: list[object]) -> Move:
    return Move(Host(qemu_binary(version)), version, preempt, directory, closing)


@pytest.mark.parametrize(("version", "preempt"), cases("two-cuts"))
async def test_two_cuts_and_a_guest_that_is_whole(
    version: str, preempt: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    way = move(version, preempt, tmp_path, closing)
    relay = await way.begin(("-ram-dir", str(tmp_path), "-name", "g") if preempt else ())
    relay.cut_after(1 << 20)
    await postcopy_in.paused(way.source, way.daemon)
    relay = await way.come_back()
    relay.cut_after(1 << 20)
    await postcopy_in.paused(way.source, way.daemon)
    relay = await way.come_back()
    await way.daemon.wait_migration("postcopy-active", "completed")
    assert relay.connections == (2 if preempt else 1)
    passes = await way.finish()
    again = ["postcopy-paused", "postcopy-recover", "postcopy-active"]
    assert [status for status in statuses(way.daemon) if status.startswith("postcopy")] == [
        "postcopy-device", "postcopy-active", *again, *again,
    ]  # fmt: skip
    row = (version, "yes" if preempt else "no", "cut twice", "yes", f"yes, {passes} passes")
    report(request, row)


@pytest.mark.parametrize(("version", "preempt"), cases("dead-path"))
async def test_recovery_over_a_dead_path_fails_fast_and_a_good_one_works(
    version: str, preempt: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    way = move(version, preempt, tmp_path, closing)
    relay = await way.begin()
    relay.cut()
    await postcopy_in.paused(way.source, way.daemon)
    dead = await way.relay()
    await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/d2.sock"})
    if version == "7.2":
        # Its source waits for ever for a path that dies once it is connected.
        dead.cut()
        (tmp_path / "r2.sock").unlink(missing_ok=True)
        with contextlib.suppress(ExecuteError):
            await way.source.execute("migrate", {"uri": dead.uri, "resume": True})
    else:
        dead.cut_after(10)
        await way.source.execute("migrate", {"uri": dead.uri, "resume": True})
        await way.daemon.wait_event(
            "MIGRATION", matching=lambda data: data["status"] == "postcopy-recover"
        )
    await postcopy_in.paused(way.daemon, way.source)
    await way.come_back()
    passes = await way.finish()
    row = (version, "yes" if preempt else "no", "dead path first", "yes", f"yes, {passes} passes")
    report(request, row)


@pytest.mark.parametrize(("version", "preempt"), cases("hang"))
async def test_migrate_pause_ends_a_hang_at_this_end(
    version: str, preempt: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    way = move(version, preempt, tmp_path, closing)
    relay = await way.begin()
    relay.stall()
    await asyncio.sleep(0.1)
    assert (await way.daemon.query_migrate())["status"] == "postcopy-active"
    await way.daemon.execute("migrate-pause")
    await postcopy_in.paused(way.daemon)
    with pytest.raises(ExecuteError, match="only supported during postcopy-active"):
        await way.daemon.execute("migrate-pause")
    await way.source.execute("migrate-pause")
    await postcopy_in.paused(way.source)
    relay = await way.come_back()
    # The source can do the same.
    await way.daemon.wait_migration("postcopy-active")
    await way.source.execute("migrate-pause")
    await postcopy_in.paused(way.source, way.daemon)
    await way.come_back()
    passes = await way.finish()
    row = (
        version,
        "yes" if preempt else "no",
        "hang, migrate-pause",
        "yes",
        f"yes, {passes} passes",
    )
    report(request, row)


@pytest.mark.matrix
@pytest.mark.parametrize("version", RELEASES)
async def test_cuts_at_random_points(
    version: str, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    rng = random.Random(version)
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        way = move(version, rng.random() < 0.5, directory, closing)
        relay = await way.begin()
        points = []
        for _ in range(2):
            # From inside the recovery's first commands to well into the pages. QEMU 7.2's source
            # waits for ever when the path dies before the recovery is through.
            points.append(int(2 ** rng.uniform(13 if version == "7.2" else 3, 20)))
            relay.cut_after(points[-1])
            if rng.random() < 0.3:
                await way.source.wait_migration("postcopy-active", "postcopy-paused")
                with contextlib.suppress(ExecuteError):  # cut already
                    await (way.daemon if rng.random() < 0.5 else way.source).execute(
                        "migrate-pause"
                    )
            await postcopy_in.paused(way.source, way.daemon)
            relay = await way.come_back()
        passes = await way.finish()
        row = (version, "yes" if way.preempt else "no", f"cut after {points} bytes", "yes",
               f"yes, {passes} passes")  # fmt: skip
        report(request, row)
        for peer in closing:
            await peer.close()  # type: ignore[attr-defined]
        closing.clear()


async def test_from_one_daemon_to_another_and_twice_cut(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    path, digest, _ = parked_file
    here = await DaemonProcess.start(incoming=f"file:{path}")
    closing.append(here)
    there = await DaemonProcess.start(incoming="defer")
    closing.append(there)
    await here.wait_migration("completed")
    switched = postcopy_in.capabilities(preempt=True)
    await here.set_capabilities(switched)
    await here.set_parameters(
        {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": LATE_BYTES_PER_S}
    )
    await there.set_capabilities(switched)
    since = 0
    for number in range(3):
        relay = await Relay(tmp_path / f"r{number}.sock", tmp_path / f"d{number}.sock").start()
        closing.append(relay)
        listens = f"unix:{tmp_path}/d{number}.sock"
        if number:
            since = len(there.events)
            await postcopy_in.resume(here, there, relay.uri, listens)
        else:
            await there.execute("migrate-incoming", {"uri": listens})
            await here.execute("migrate", {"uri": relay.uri})
            await here.execute("migrate-start-postcopy")
        if number < 2:
            await there.wait_event(
                "MIGRATION", matching=lambda data: data["status"] == "postcopy-active", since=since
            )
            relay.cut_after(1 << 20)
            await postcopy_in.paused(here, there)
    for peer in (here, there):
        await peer.wait_migration("completed")
    await there.set_capabilities(postcopy_in.OFF)
    arrived, target = await move_on(there, qemu_host, tmp_path)
    closing.append(target)
    assert arrived == digest


async def test_recovery_refuses_what_it_must_and_the_monitor_stays_quick(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    way = Move(qemu_host, "", False, tmp_path, closing)
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    with pytest.raises(ExecuteError, match="when postcopy is paused"):
        await daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/x.sock"})
    relay = await way.begin()
    with pytest.raises(ExecuteError, match="when postcopy is paused"):
        await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/x.sock"})
    relay.cut()
    await postcopy_in.paused(way.source, way.daemon)
    with pytest.raises(ExecuteError, match="unknown migration protocol"):
        await way.daemon.execute("migrate-recover", {"uri": "bogus:"})
    # The last address counts, and the one before it is gone.
    for number in (1, 2):
        await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/w{number}.sock"})
    assert not (tmp_path / "w1.sock").exists()
    info = await way.daemon.query_migrate()
    assert info["socket-address"] == [{"type": "unix", "path": f"{tmp_path}/w2.sock"}]

    # Whoever else comes costs one recovery, and nothing more.
    for data, said in (
        (b"QEVM\0\0\0\3", "unknown element"),
        (bytes.fromhex("08 000a 0004 03") + b"foo", "'foo', which this guest does not have"),
        (bytes.fromhex("08 000a 0003 07") + b"ab", "RECV_BITMAP of 3 bytes"),
        (bytes.fromhex("08 0063 0000"), "unknown command 99"),
        (bytes.fromhex("02 7fffffff"), "was never started"),
    ):
        await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/w2.sock"})
        since = len(way.daemon.events)
        _, writer = await asyncio.open_unix_connection(tmp_path / "w2.sock")
        writer.write(data)
        await way.daemon.wait_event(
            "MIGRATION", matching=lambda data: data["status"] == "postcopy-paused", since=since
        )
        assert said in str((await way.daemon.query_migrate())["error-desc"])
        writer.close()

    # One that says nothing holds neither the monitor nor the guest.
    await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/w2.sock"})
    since = len(way.daemon.events)
    _, writer = await asyncio.open_unix_connection(tmp_path / "w2.sock")
    await way.daemon.wait_event(
        "MIGRATION", matching=lambda data: data["status"] == "postcopy-recover", since=since
    )
    with pytest.raises(ExecuteError, match="when postcopy is paused"):
        await way.daemon.execute("migrate-recover", {"uri": f"unix:{tmp_path}/w2.sock"})
    loop = asyncio.get_running_loop()
    slowest = 0.0
    for _ in range(50):
        start = loop.time()
        await way.daemon.execute("query-status")
        slowest = max(slowest, loop.time() - start)
    assert slowest < AT_ONCE_S
    since = len(way.daemon.events)
    await way.daemon.execute("migrate-pause")
    await way.daemon.wait_event(
        "MIGRATION", matching=lambda data: data["status"] == "postcopy-paused", since=since
    )
    writer.close()
    await way.come_back()
    await way.finish()


@pytest.mark.matrix
async def test_migrationctl_recovers_with_one_command(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    way = Move(qemu_host, "", True, tmp_path, closing)
    await way.begin()
    await way.source.set_parameters({"max-postcopy-bandwidth": 2 << 20})
    await way.source.qmp.disconnect()
    await way.daemon.qmp.disconnect()
    way.relays += 1
    listens = f"unix:{tmp_path}/d{way.relays}.sock"
    arguments = ["-s", str(way.source.qmp_path)]
    # Nothing is lost yet: both ends are paused first.
    code, text = await ctl(*arguments, "recover", "-d", str(way.daemon.qmp_path), listens)
    assert code == 0, text
    code, text = await ctl("-s", str(way.daemon.qmp_path), "pause")
    assert code == 0, text
    code, text = await ctl(*arguments, "status")
    assert "postcopy-paused: the connection is lost" in text
    code, text = await ctl(*arguments, "recover", str(way.daemon.qmp_path), listens)
    assert code == 0
    assert "postcopy-active: the guest has moved, its memory follows" in text
    assert text.splitlines()[-1].startswith("completed")
    code, text = await ctl(*arguments, "recover", str(way.daemon.qmp_path), listens)
    assert code == 1
    assert "no postcopy to recover" in text


@pytest.mark.parametrize("rests", ["memory", "a file"])
async def test_a_source_that_never_hears_that_its_guest_was_loaded_keeps_it(
    rests: str, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """The answer to PING 0x42 is lost: QEMU goes on with the guest, and nobody else may."""
    arguments = ("-ram-dir", str(tmp_path / "ram"), "-name", "g") if rests == "a file" else ()
    source, daemon = await start_both(
        closing,
        Host(qemu_binary("11.1")).start("QEMU A"),
        DaemonProcess.start(incoming="defer", arguments=arguments),
    )
    relay = await Relay(tmp_path / "relay", tmp_path / "in").start()
    closing.append(relay)
    relay.cut_at_answer(encode_return_path(Pong(PING_PACKAGE_LOADED)))
    await source.wait_serial(3)
    await postcopy_in.begin(source, daemon, relay.uri, preempt=False, listens=f"unix:{tmp_path}/in")
    await daemon.wait_migration("postcopy-paused")
    await source.wait_migration("failed")
    assert relay.is_cut
    seen = len(source.serial)
    await source.wait_serial(seen + 3)
    assert await source.run_state() == "running"
    count_passes(source.serial)
    # What arrived is never offered, not by the next daemon either.
    with pytest.raises(ExecuteError):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/elsewhere"})
    assert await daemon.quit() == 0
    if rests == "a file":
        daemon = await DaemonProcess.start(arguments=list(arguments))
        closing.append(daemon)
        assert await daemon.run_state() == "prelaunch"
    report(request, ("11.1", "no", "answer to PING 0x42 lost", "runs at its source", "there"))

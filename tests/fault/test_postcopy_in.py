"""Bad sources of a postcopy: before the switch the guest stays there, behind it stays here."""

import asyncio
import os
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.codec.postcopy import encode_advise, encode_packaged, encode_recv_bitmap
from migrationd.codec.return_path import Shut
from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import AT_ONCE_S
from tests.support.fake_source import (
    BLOCK_LIST,
    DEVICE,
    EOS,
    HEAD,
    LISTEN,
    OPEN_RETURN_PATH,
    PACKAGE,
    PAGE,
    PAGES,
    PART,
    RUN,
    SETUP,
    FakeSource,
    page,
    part,
    ping,
)  # fmt: skip
from tests.support.results import add_row
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.fault

TABLE = "bad sources of a postcopy: what query-migrate says"


def report(config: pytest.Config, name: str, when: str, text: str) -> None:
    add_row(config, TABLE, (name, when, text), head=("what came", "when", "status, error-desc"))


class Destination:
    """A daemon that takes postcopy, and the sources that come to it."""

    def __init__(self, daemon: DaemonProcess, directory: Path, closing: list[object]) -> None:
        self.daemon = daemon
        self.path = directory / "in.sock"
        self.uri = f"unix:{self.path}"
        self._closing = closing

    async def connect(self) -> FakeSource:
        source = await FakeSource.connect(self.path)
        self._closing.append(source)
        return source

    async def incoming(self, *, preempt: bool = False) -> FakeSource:
        await self.daemon.set_capabilities(
            {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}
        )
        await self.daemon.execute("migrate-incoming", {"uri": self.uri, "exit-on-error": False})
        return await self.connect()

    async def recover(self) -> FakeSource:
        """Open the door and come in."""
        await self.status("postcopy-paused")
        await self.daemon.execute("migrate-recover", {"uri": self.uri})
        return await self.connect()

    async def status(self, wanted: str) -> str:
        """Wait for a status; returns the error."""
        info = await self.daemon.wait_migration(wanted)
        return str(info.get("error-desc", ""))

    async def paused_again(self, since: int) -> str:
        """Wait until the next pause; returns the error."""
        await self.daemon.wait_event(
            "MIGRATION", matching=lambda data: data["status"] == "postcopy-paused", since=since
        )
        return await self.status("postcopy-paused")


@pytest.fixture
async def destination(tmp_path: Path, closing: list[object]) -> Destination:
    daemon = await DaemonProcess.start(incoming="defer", arguments=["-ram-limit", "1G"])
    closing.append(daemon)
    return Destination(daemon, tmp_path, closing)


BEFORE: dict[str, tuple[bytes, str]] = {
    "ADVISE of other target pages": (
        HEAD + OPEN_RETURN_PATH + encode_advise([PAGE], 16384), "target pages of 16384",
    ),
    "ADVISE twice": (SETUP.replace(BLOCK_LIST, encode_advise([PAGE], PAGE)), "ADVISE when advised"),
    "ADVISE of dirty bitmaps only": (
        HEAD + OPEN_RETURN_PATH + bytes.fromhex("08 0003 0000"), "on here but off at the source",
    ),
    "postcopy without a return path": (HEAD + encode_advise([PAGE], PAGE), "return path"),
    "discard of an unknown block": (
        SETUP + bytes.fromhex("08 0006 0016 00 03") + b"foo" + bytes(17), "'foo', which",
    ),
    "discard outside the block": (
        SETUP + bytes.fromhex("08 0006 0019 00 06") + b"pc.ram" + b"\0"
        + (1 << 62).to_bytes(8, "big") + PAGE.to_bytes(8, "big"), "outside the block",
    ),
    "discard of half a page": (
        SETUP + bytes.fromhex("08 0006 0019 00 06") + b"pc.ram" + b"\0"
        + (0).to_bytes(8, "big") + (100).to_bytes(8, "big"), "whole pages",
    ),
    "LISTEN outside a package": (SETUP + LISTEN, "outside a package"),
    "a package of 4 GiB": (SETUP + bytes.fromhex("08 0007 0004 ffffffff"), "the limit is"),
    "a package without LISTEN": (SETUP + encode_packaged(DEVICE + RUN), "begin with LISTEN"),
    "a package without RUN": (SETUP + encode_packaged(LISTEN + DEVICE), "end with RUN"),
    "a package in a package": (SETUP + encode_packaged(LISTEN + PACKAGE + RUN), "in a package"),
    "the same device twice": (
        SETUP + encode_packaged(LISTEN + DEVICE + DEVICE + RUN), "duplicate section",
    ),
    "a package cut short": (SETUP + PACKAGE[:-9], "ended"),
}  # fmt: skip


async def test_what_is_bad_before_the_switch_fails_and_the_source_is_told(
    destination: Destination, request: pytest.FixtureRequest
) -> None:
    for name, (data, expected) in BEFORE.items():
        source = await destination.incoming()
        source.send(data)
        if name == "a package cut short":
            await source.close()
        elif OPEN_RETURN_PATH in data:
            assert await source.wait_answer(Shut) == Shut(1), name
        text = (await destination.status("failed")).removeprefix("load of migration failed: ")
        assert expected in text, f"{name}: {text}"
        report(request.config, name, "before the switch", f"failed: {text}")
        assert await destination.daemon.run_state() == "inmigrate"


AFTER: dict[str, tuple[bytes, str]] = {
    "a page outside the block": (
        part((PAGES * PAGE | 8).to_bytes(8, "big") + b"\6pc.ram"),
        "outside",
    ),
    "a page of an unknown block": (part((8).to_bytes(8, "big") + b"\3foo"), "'foo', which"),
    "CONTINUE outside the block": (
        part((PAGES * PAGE | 0x28).to_bytes(8, "big") + bytes(PAGE)),
        "outside",
    ),
    "an XBZRLE page": (part((0x40).to_bytes(8, "big") + b"\6pc.ram\1\0\4\0\2xx"), "XBZRLE"),
    "a wrong footer": (PART + EOS + bytes.fromhex("7e 00000009"), "footer names section 9"),
    "a second package": (PACKAGE, "a package when running"),
    "a discard": (
        bytes.fromhex("08 0006 0019 00 06") + b"pc.ram" + b"\0" + (0).to_bytes(8, "big")
        + PAGE.to_bytes(8, "big"), "RAM_DISCARD when running",
    ),
    "RECV_BITMAP outside a recovery": (encode_recv_bitmap("pc.ram"), "RECV_BITMAP when running"),
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", "unknown element"),
    "a second stream": (HEAD, "unknown element"),
}  # fmt: skip

AGAIN: dict[str, tuple[bytes, str]] = {
    "RECV_BITMAP of another guest": (encode_recv_bitmap("other.ram"), "'other.ram', which"),
    "RECV_BITMAP of a wrong length": (bytes.fromhex("08 000a 0003 07 6162"), "RECV_BITMAP of 3"),
    "pages before RESUME": (part(page(9)), "before POSTCOPY_RESUME"),
    "a whole new stream": (SETUP, "unknown element"),
    "a section of another guest": (bytes.fromhex("02 00000063"), "never started"),
    "a package again": (PACKAGE, "a package when recovering"),
}


async def test_what_is_bad_behind_the_switch_is_a_pause_that_loses_nothing(
    destination: Destination, request: pytest.FixtureRequest
) -> None:
    source = await destination.incoming()
    await source.turn(page(3), page(4))
    came = [3, 4]
    for number, (name, (data, expected)) in enumerate(AFTER.items()):
        since = len(destination.daemon.events)
        source.send(part(page(10 + number)) + data)
        came.append(10 + number)
        text = await destination.paused_again(since)
        assert expected in text, f"{name}: {text}"
        report(request.config, name, "behind the switch", f"postcopy-paused: {text}")
        source = await destination.recover()
        assert await source.recover() == came, name
    since = len(destination.daemon.events)
    await source.close()
    assert await destination.paused_again(since) == "", "a lost connection is no error"
    for name, (data, expected) in AGAIN.items():
        since = len(destination.daemon.events)
        source = await destination.recover()
        source.send(data)
        text = await destination.paused_again(since)
        assert expected in text, f"{name}: {text}"
        report(request.config, name, "during a recovery", f"postcopy-paused: {text}")
    source = await destination.recover()
    assert await source.recover() == came
    await source.finish(*(page(number) for number in range(PAGES) if number not in came))
    await destination.status("completed")
    assert await destination.daemon.run_state() == "paused"


async def test_a_source_may_leave_zero_pages_out(destination: Destination) -> None:
    source = await destination.incoming()
    await source.turn(page(1))
    await source.finish()
    await destination.status("completed")


async def test_a_cut_package_answer_leaves_the_guest_at_the_source(
    destination: Destination,
) -> None:
    """QEMU 10.2 and later take the guest back when the answer to PING 0x42 does not come."""
    source = await destination.incoming()
    source.send(SETUP + PACKAGE[:-20])
    await destination.status("active")
    await source.close()
    await destination.status("failed")
    assert await destination.daemon.run_state() == "inmigrate"


async def test_a_flood_of_commands_does_not_hold_the_monitor(destination: Destination) -> None:
    source = await destination.incoming()
    ranges = b"".join(n.to_bytes(8, "big") for _ in range(4000) for n in (0, PAGES * PAGE))
    discard = b"\0\6pc.ram\0" + ranges
    source.send(SETUP + part(*(page(number) for number in range(PAGES))))
    source.send((b"\x08\0\6" + len(discard).to_bytes(2, "big") + discard) * 100)
    source.send(ping(2) * 100_000)
    loop = asyncio.get_running_loop()
    slowest = 0.0
    for _ in range(100):
        start = loop.time()
        await destination.daemon.execute("query-status")
        slowest = max(slowest, loop.time() - start)
    assert slowest < AT_ONCE_S
    await source.close()
    await destination.status("failed")


async def test_a_preempt_channel_that_never_comes_is_not_missed(destination: Destination) -> None:
    source = await destination.incoming(preempt=True)
    await source.turn(page(1))
    await source.finish(page(2))
    await destination.status("completed")


URGENT: dict[str, tuple[bytes, str]] = {
    "cut inside a page": (page(5)[:-1], ""),
    "a stream": (b"QEVM\0\0\0\3", "RAM record with flags"),
    "a flush": ((0x200).to_bytes(8, "big"), "no page"),
    "a page outside the block": (page(PAGES), "outside the block"),
}


async def test_a_preempt_channel_that_breaks_is_a_pause(
    destination: Destination, request: pytest.FixtureRequest
) -> None:
    source = await destination.incoming(preempt=True)
    urgent = await destination.connect()
    await source.turn()
    came = []
    for number, (name, (data, said)) in enumerate(URGENT.items()):
        since = len(destination.daemon.events)
        came.append(20 + number)
        urgent.send(page(came[-1]) + data)
        urgent.end()
        text = await destination.paused_again(since)
        assert said in text, name
        where = "preempt channel, behind the switch"
        report(request.config, name, where, f"postcopy-paused: {text}")
        source = await destination.recover()
        urgent = await destination.connect()
        assert await source.recover() == came
    urgent.send(page(5))
    await asyncio.sleep(0.05)
    await source.finish(page(6))
    await destination.status("completed")


async def test_a_disk_that_fills_is_a_pause_and_room_is_a_recovery(
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        daemon = await DaemonProcess.start(
            incoming="defer", arguments=["-ram-dir", str(disk), "-name", "g"]
        )
        closing.append(daemon)
        destination = Destination(daemon, tmp_path, closing)
        ballast = disk / "ballast"
        source = await destination.incoming()
        await source.turn(page(1), page(2))
        await asyncio.sleep(0.1)
        ballast.write_bytes(bytes(disk_room(disk) - 4 * PAGE))
        source.send(part(*(page(number) for number in range(10, 40))))
        text = await destination.status("postcopy-paused")
        assert "No space left on device" in text
        report(request.config, "a disk that fills", "behind the switch", f"postcopy-paused: {text}")
        source = await destination.recover()
        came = await source.recover()
        assert {1, 2} < set(came)
        assert len(came) < 32
        ballast.unlink()
        await source.finish(*(page(n) for n in range(PAGES // 2) if n not in came))
        await destination.status("completed")
        assert (disk / "g.mapped-ram").exists()
        assert await daemon.quit() == 0


def disk_room(path: Path) -> int:
    """Bytes that are free."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_bsize


async def test_a_daemon_that_stands_still_can_be_told_to_end(destination: Destination) -> None:
    source = await destination.incoming()
    await source.turn(page(1))
    await source.close()
    await destination.status("postcopy-paused")
    await destination.daemon.execute("migrate_cancel")
    assert (await destination.daemon.query_migrate())["status"] == "postcopy-paused"
    with pytest.raises(ExecuteError, match="already been started"):
        await destination.daemon.execute("migrate-incoming", {"uri": destination.uri})
    with pytest.raises(ExecuteError):
        await destination.daemon.execute("migrate", {"uri": destination.uri})
    assert await destination.daemon.quit() == 0
    assert "abandoned before it was whole" in destination.daemon.stderr

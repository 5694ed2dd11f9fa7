"""A disk that takes no record of who owns the guest: there is never a second owner."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from migrationd.codec.return_path import Shut, encode_return_path
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from tests.support.moves import Host
from tests.support.parked_file import expect_move, holder
from tests.support.unix_server import UnixServer

pytestmark = pytest.mark.fault

OPTIONS = ["-name", "vm1", "-ram-dir"]


class Disk:
    """A directory with a guest; its record cannot be replaced while it is broken."""

    def __init__(self, directory: Path) -> None:
        self.options = [*OPTIONS, str(directory)]
        self._record = directory / "vm1.json"
        self._part = directory / "vm1.json.part"

    @property
    def owner(self) -> str:
        return str(json.loads(self._record.read_text())["owner"])

    def break_down(self) -> None:
        self._part.mkdir()

    def mend(self) -> None:
        self._part.rmdir()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "ram")


@pytest.fixture
async def daemon(
    disk: Disk, parked_file: tuple[Path, str, str], closing: list[object]
) -> DaemonProcess:
    daemon = await holder(parked_file[0], closing, arguments=disk.options)
    await daemon.set_capabilities({"return-path": True})
    await daemon.set_parameters({"max-bandwidth": 0})
    return daemon


class Destination(UnixServer):
    """Takes a stream, and says what it is told to say."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.uri = f"unix:{path}"

    def say(self, word: bytes) -> None:
        """Say something on every connection; nothing: hang up."""
        for writer in self._writers:
            if word:
                writer.write(word)
            else:
                writer.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._swallow(reader)))

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 20):
                pass


async def expect_refused(peer: PeerProcess, command: str, reason: str, uri: str = "") -> None:
    with pytest.raises(Exception, match=reason):
        await peer.execute(command, {"uri": uri} if uri else {})


async def test_it_stays_if_it_cannot_be_put_on_record_that_it_leaves(
    daemon: DaemonProcess, disk: Disk, parked_file: tuple[Path, str, str], qemu_host: Host,
    tmp_path: Path, closing: list[object],
) -> None:  # fmt: skip
    disk.break_down()
    async with Destination(tmp_path / "sock") as there:
        await daemon.execute("migrate", {"uri": there.uri})
        info = await daemon.wait_migration("failed")
    assert "Is a directory" in str(info["error-desc"])
    disk.mend()
    await expect_move(daemon, *parked_file[1:], qemu_host, tmp_path, closing)


async def test_it_stays_if_it_cannot_be_put_on_record_that_it_did_not_leave(
    daemon: DaemonProcess, disk: Disk, parked_file: tuple[Path, str, str], qemu_host: Host,
    tmp_path: Path, closing: list[object],
) -> None:  # fmt: skip
    async with Destination(tmp_path / "sock") as there:
        await daemon.execute("migrate", {"uri": there.uri})
        await daemon.wait_migration("device")
        disk.break_down()
        there.say(b"")
        await daemon.wait_migration("failed")
    assert disk.owner == "handing-over"
    disk.mend()
    await expect_move(daemon, *parked_file[1:], qemu_host, tmp_path, closing)


async def test_it_is_gone_also_if_that_cannot_be_put_on_record(
    daemon: DaemonProcess, disk: Disk, tmp_path: Path, closing: list[object]
) -> None:
    async with Destination(tmp_path / "sock") as there:
        await daemon.execute("migrate", {"uri": there.uri})
        await daemon.wait_migration("device")
        disk.break_down()
        there.say(encode_return_path(Shut(0)))
        await daemon.wait_migration("completed")
        assert await daemon.run_state() == "postmigrate"
        await expect_refused(daemon, "migrate", "paused due to previous migration", there.uri)
    await daemon.kill()
    disk.mend()
    assert disk.owner == "handing-over"
    second = await DaemonProcess.start(arguments=disk.options)
    closing.append(second)
    assert await second.run_state() == "postmigrate"
    await expect_refused(second, "migrate", "paused due to previous migration", there.uri)


async def test_it_is_taken_back_when_that_is_on_record(
    daemon: DaemonProcess, disk: Disk, tmp_path: Path
) -> None:
    async with Destination(tmp_path / "sock") as there:
        await daemon.execute("migrate", {"uri": there.uri})
        await daemon.wait_migration("device")
        there.say(encode_return_path(Shut(0)))
        await daemon.wait_migration("completed")
    disk.break_down()
    await expect_refused(daemon, "cont", "Is a directory")
    assert await daemon.run_state() == "postmigrate"
    disk.mend()
    await daemon.execute("cont")
    assert await daemon.run_state() == "paused"
    assert disk.owner == "held"

"""What the destination makes of a failure that nobody foresaw."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from migrationd.codec.postcopy import encode_recv_bitmap, encode_resume
from migrationd.codec.ram_encode import encode_block_list, encode_eos
from migrationd.codec.records import RamBlockEntry
from migrationd.codec.section import encode_section_header
from migrationd.daemon.shelter import MemoryBerth
from migrationd.errors import StoreError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.incoming.driver import IncomingMigration, IncomingSettings
from migrationd.transport.address import FdAddress
from migrationd.transport.listen import listen
from tests.support.deadline import until
from tests.support.fake_source import END, PACKAGE, SETUP, page, part

HEAD = (
    bytes.fromhex("5145564d00000003")
    + encode_section_header(1, 1, "ram", 0, 4)
    + encode_block_list((RamBlockEntry("ram", 1 << 20),))
    + encode_eos()
)


class BrokenBerth:
    """A berth with a defect."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.was_abandoned = False

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        raise self._error

    def settle(self, guest: ParkedGuest) -> None:
        raise AssertionError("nothing arrived")

    def abandon(self) -> None:
        self.was_abandoned = True


@pytest.mark.parametrize("error", [MemoryError(), ValueError("shape"), IndexError("axis")])
async def test_a_defect_ends_as_a_failed_migration(error: Exception) -> None:
    ours, theirs = socket.socketpair()
    berth = BrokenBerth(error)
    statuses: list[str] = []
    incoming = IncomingMigration(berth, IncomingSettings, statuses.append)
    incoming.begin()
    incoming.listen_on(await listen(FdAddress("source"), lambda _: ours.detach()))
    with theirs:
        theirs.sendall(HEAD)
        async with asyncio.timeout(10):
            assert await incoming.run() is None
        assert theirs.recv(1) == b""
    assert statuses == ["setup", "active", "failed"]
    assert "internal error" in str(incoming.error)
    assert type(error).__name__ in str(incoming.error)
    assert berth.was_abandoned


class FullBerth(MemoryBerth):
    """Room in memory; its first settling fails."""

    def __init__(self) -> None:
        super().__init__()
        self.settled = 0

    def settle(self, guest: HeldGuest) -> None:
        self.settled += 1
        if self.settled == 1:
            raise StoreError("the guest cannot be stored: No space left on device")

    def abandon(self) -> None:
        raise AssertionError("a guest that its source has given up is kept")


async def test_a_guest_that_came_by_postcopy_and_cannot_be_stored_is_kept() -> None:
    ours, theirs = socket.socketpair()
    again, theirs_again = socket.socketpair()
    berth = FullBerth()
    statuses: list[str] = []
    settings = IncomingSettings(postcopy_ram=True)
    incoming = IncomingMigration(berth, lambda: settings, statuses.append)
    incoming.begin()
    incoming.listen_on(await listen(FdAddress("source"), lambda _: ours.detach()))
    with theirs, theirs_again:
        run = asyncio.create_task(incoming.run())
        theirs.sendall(SETUP + PACKAGE + part(page(1)) + END)
        await until(lambda: incoming.status == "postcopy-paused", "the store fails")
        assert incoming.owns_guest
        info = incoming.info()
        assert info is not None
        assert "No space left" in str(info.error_desc)
        assert not incoming.pause()
        theirs_again.sendall(encode_recv_bitmap("pc.ram") + encode_resume() + END)
        incoming.recover_on(await listen(FdAddress("source"), lambda _: again.detach()))
        async with asyncio.timeout(10):
            guest = await run
        assert guest is not None
        assert guest.devices[0].idstr == "timer"
        assert bytes(guest.ram[0].page(1)) == b"\2" * 4096
        guest.close()
    assert statuses == [
        "setup", "active", "postcopy-device", "postcopy-active",
        "postcopy-paused", "postcopy-recover", "postcopy-active", "completed",
    ]  # fmt: skip
    assert berth.settled == 2

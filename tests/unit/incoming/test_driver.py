"""What the destination makes of a failure that nobody foresaw."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from migrationd.codec.ram_encode import encode_block_list, encode_eos
from migrationd.codec.records import RamBlockEntry
from migrationd.codec.section import encode_section_header
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.incoming.driver import IncomingMigration, IncomingSettings
from migrationd.transport.address import FdAddress
from migrationd.transport.listen import listen

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

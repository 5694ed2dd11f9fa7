"""A replica follows in memory and rests in a directory once it is the guest."""

import os
from pathlib import Path

import numpy as np
import pytest

from migrationd.codec.constants import QEMU_VM_SECTION_FULL
from migrationd.daemon.replica_berth import ReplicaBerth
from migrationd.daemon.shelter import FileBerth, MemoryBerth, open_saved
from migrationd.errors import StoreError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.store.parked_directory import ParkedDirectory

PAGE = 4096
EARLY = DeviceState("early", 0, 1, b"e", QEMU_VM_SECTION_FULL, 1, is_early=True)
TIMER = DeviceState("timer", 0, 2, b"t" * 24, QEMU_VM_SECTION_FULL, 0)
SPECS = [RamBlockSpec("ram", 9000 * PAGE, PAGE), RamBlockSpec("rom", PAGE, PAGE)]


def replica(berth: ReplicaBerth) -> ParkedGuest:
    guest = berth.allocate(GuestIdentity("pc-1"), (EARLY,), SPECS)
    assert isinstance(guest, ParkedGuest)
    for page in (0, 7, 8, 8999):
        content = np.full((1, PAGE), page % 251 + 1, np.uint8)
        guest.ram[0].place_batch(np.array([page]), content, is_run=True)
    guest.complete((EARLY, TIMER), b'{"devices": []}', SeenOnArrival())
    berth.settle(guest)
    return guest


def test_it_is_written_when_it_takes_over(tmp_path: Path) -> None:
    directory = ParkedDirectory(tmp_path, "guest")
    berth = ReplicaBerth(MemoryBerth(), FileBerth(directory))
    follower = replica(berth)
    content = follower.ram[0].memory.view.copy()
    assert directory.find() is None
    guest = berth.take_over(follower)
    assert isinstance(guest, ParkedGuest)
    assert guest.file is not None
    assert follower.ram == (), "the memory is given back"
    assert guest.devices == (EARLY, TIMER)
    assert (guest.ram[0].memory.view == content).all()
    guest.close()
    saved = directory.find()
    assert saved is not None
    again = open_saved(saved)
    assert (again.ram[0].memory.view == content).all()
    assert [device.body for device in again.devices] == [b"e", b"t" * 24]
    again.close()
    directory.close()


class Full(FileBerth):
    """Its disk is full in the end."""

    def settle(self, guest: object) -> None:
        raise StoreError("No space left on device")


def test_where_it_cannot_be_written_it_takes_over_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = ParkedDirectory(tmp_path, "guest")
    berth = ReplicaBerth(MemoryBerth(), Full(directory))
    follower = replica(berth)
    assert berth.take_over(follower) is follower
    assert "takes over in memory" in caplog.text
    assert follower.ram[0].memory.view[8999 * PAGE] == 8999 % 251 + 1
    assert not any(name.endswith(("mapped-ram", "part")) for name in os.listdir(tmp_path))
    follower.close()
    directory.close()

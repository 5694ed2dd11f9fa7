"""Room for a parked guest that brings its memory."""

import os

import pytest

from migrationd.codec.cpr import CprEntry, CprState
from migrationd.daemon.cpr_berth import ParkedCprBerth
from migrationd.errors import GuestError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.handed import HandedMemory, empty_memfd
from migrationd.guest.ram_block import RamBlockSpec
from tests.support.descriptors import open_count

SPECS = [RamBlockSpec("pc.ram", 8192, 4096), RamBlockSpec("pc.rom", 4096, 4096)]
STATE = CprState((CprEntry("pc.rom"), CprEntry("pc.ram"), CprEntry("tap", 3)))


def handed() -> HandedMemory:
    sizes = (4096, 8192, 4096)
    return HandedMemory(STATE, [empty_memfd("x", size) for size in sizes])


def test_every_descriptor_stays_with_the_guest() -> None:
    before = open_count()
    berth = ParkedCprBerth(None)
    memory = handed()
    os.pwrite(memory.fds[1], b"ram", 0)
    berth.take(memory)
    guest = berth.allocate(GuestIdentity("pc"), (), SPECS)
    guest.complete((), None, SeenOnArrival())
    berth.settle(guest)
    assert bytes(guest.ram[0].page(0)[:3]) == b"ram"
    offered = guest.offer_memory()
    assert offered.state == STATE
    offered.close()
    guest.close()
    assert open_count() == before


def test_what_does_not_fit_is_let_go() -> None:
    before = open_count()
    berth = ParkedCprBerth(None)
    with pytest.raises(GuestError, match="its cpr channel is missing"):
        berth.allocate(GuestIdentity("pc"), (), SPECS)
    berth.take(handed())
    with pytest.raises(GuestError, match=r"'pc\.ram' is 8192 bytes, not 16384"):
        berth.allocate(GuestIdentity("pc"), (), [RamBlockSpec("pc.ram", 16384, 4096)])
    with pytest.raises(GuestError, match="'vga' came without its memory"):
        berth.allocate(GuestIdentity("pc"), (), [*SPECS, RamBlockSpec("vga", 4096, 4096)])
    berth.abandon()
    berth.abandon()
    with pytest.raises(GuestError, match="memory of 16384 bytes is more than -ram-limit"):
        ParkedCprBerth(8192).take(handed())
    assert open_count() == before

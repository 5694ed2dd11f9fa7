"""Memory that passes by its descriptors."""

import os

import pytest

from migrationd.codec.cpr import CprEntry, CprState
from migrationd.errors import GuestError, StreamCorrupt
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.handed import HandedMemory, empty_memfd
from migrationd.guest.memory import SharedMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec

STATE = CprState((CprEntry("a"), CprEntry("a", 1)), b"\x05tail")


def handed() -> HandedMemory:
    return HandedMemory(STATE, [empty_memfd("a", 8192), empty_memfd("a/1", 4096)])


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_block_is_found_by_its_name_and_first_number() -> None:
    memory = handed()
    assert memory.fd_of_block("a", 8192) == memory.fds[0]
    with pytest.raises(GuestError, match="'b' came without its memory"):
        memory.fd_of_block("b", 1)
    with pytest.raises(GuestError, match="'a' is 8192 bytes, not 8193"):
        memory.fd_of_block("a", 8193)
    memory.close()


def test_descriptors_are_counted_and_closed() -> None:
    before = open_count()
    with pytest.raises(StreamCorrupt, match="announces 2 descriptors, 1 came"):
        HandedMemory(STATE, [empty_memfd("a", 4096)])
    memory = handed()
    copy = memory.copy()
    assert copy.state == STATE
    assert os.path.samestat(os.fstat(copy.fds[0]), os.fstat(memory.fds[0]))
    memory.close()
    memory.close()
    copy.close()
    assert open_count() == before


def test_a_parked_guest_stays_in_the_memory_that_it_had() -> None:
    before = open_count()
    memory = handed()
    os.pwrite(memory.fds[0], b"here", 4096)
    watched = os.dup(memory.fds[0])

    def memory_of(_: int, spec: RamBlockSpec) -> SharedMemory:
        fd = memory.fd_of_block(spec.idstr, spec.used_length)
        return SharedMemory(fd, spec.used_length, spec.page_size, must_seal=False)

    guest = ParkedGuest.create(GuestIdentity(), [RamBlockSpec("a", 8192, 4096)], memory_of)
    guest.complete((), None, SeenOnArrival())
    guest.keep_handed(memory)
    [block] = guest.ram
    assert block.present.tolist() == [False, True]
    assert bytes(block.page(1)[:4]) == b"here"
    offered = guest.offer_memory()
    assert offered.state == STATE
    offered.close()

    guest.check_unchanged()

    guest.give_up_memory()
    assert not guest.has_memory
    assert block.present.tolist() == [False, False]
    assert os.pread(watched, 4, 4096) == b"here"
    guest.close()
    os.close(watched)
    assert open_count() == before


def test_other_memory_cannot_be_handed_over() -> None:
    guest = ParkedGuest(GuestIdentity(), ())
    with pytest.raises(GuestError, match="not shared memory"):
        guest.offer_memory()


def test_memory_that_its_source_took_away_is_not_read() -> None:
    fd = os.memfd_create("unsealable")
    os.ftruncate(fd, 8192)
    kept = os.dup(fd)
    memory = HandedMemory(CprState((CprEntry("a"),)), [fd])

    def memory_of(_: int, spec: RamBlockSpec) -> SharedMemory:
        return SharedMemory(fd, spec.used_length, spec.page_size, must_seal=False)

    guest = ParkedGuest.create(GuestIdentity(), [RamBlockSpec("a", 8192, 4096)], memory_of)
    guest.keep_handed(memory)
    os.ftruncate(kept, 4096)
    with pytest.raises(GuestError, match="'a' is 4096 bytes, not 8192"):
        guest.check_unchanged()
    guest.close()
    os.close(kept)

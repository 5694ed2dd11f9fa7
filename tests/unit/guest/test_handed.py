"""Memory that passes by its descriptors."""

import os

import numpy as np
import pytest

from migrationd.codec.cpr import CprEntry, CprState
from migrationd.errors import GuestError, StreamCorrupt
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.handed import (
    CopiedMemory,
    HandedMemory,
    duplicate_all,
    empty_memfd,
    map_handed,
)
from migrationd.guest.memory import AnonymousMemory, Memory, SharedMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from tests.support.descriptors import open_count

STATE = CprState((CprEntry("a"), CprEntry("a", 1)), b"\x05tail")


def handed() -> HandedMemory:
    return HandedMemory(STATE, [empty_memfd("a", 8192), empty_memfd("a/1", 4096)])


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


def test_descriptors_that_were_made_are_closed_when_there_are_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = handed()
    before = open_count()
    real = os.dup

    def dup(fd: int) -> int:
        if fd == memory.fds[1]:
            raise OSError(24, "Too many open files")
        return real(fd)

    monkeypatch.setattr(os, "dup", dup)
    with pytest.raises(GuestError, match="Too many open files"):
        duplicate_all(memory.fds)
    assert open_count() == before
    memory.close()


def test_a_parked_guest_stays_in_the_memory_that_it_had() -> None:
    before = open_count()
    memory = handed()
    os.pwrite(memory.fds[0], b"here", 4096)
    watched = os.dup(memory.fds[0])

    def memory_of(_: int, spec: RamBlockSpec) -> Memory:
        fd = memory.fd_of_block(spec.idstr, spec.used_length)
        return map_handed(fd, spec.used_length, spec.page_size)

    guest = ParkedGuest.create(GuestIdentity(), [RamBlockSpec("a", 8192, 4096)], memory_of)
    guest.complete((), None, SeenOnArrival())
    guest.keep_handed(memory)
    [block] = guest.ram
    assert isinstance(block.memory, SharedMemory)
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


def test_other_memory_is_handed_over_as_a_copy() -> None:
    before = open_count()
    specs = [RamBlockSpec("ram", 8 * 4096, 4096), RamBlockSpec("rom", 4096, 4096)]
    guest = ParkedGuest.create(
        GuestIdentity(), specs, lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size)
    )
    guest.ram[0].place_batch(np.array([5]), np.full((1, 4096), 7, np.uint8), is_run=True)
    assert not guest.shares_memory
    offered = guest.offer_memory()
    assert [entry.name for entry in offered.state.entries] == ["ram", "rom"]
    fd = offered.fd_of_block("ram", 8 * 4096)
    assert os.pread(fd, 8 * 4096, 0) == bytes(5 * 4096) + bytes([7]) * 4096 + bytes(2 * 4096)
    assert os.fstat(fd).st_blocks * 512 == 4096, "what is zero takes no memory"
    os.pwrite(fd, b"theirs", 5 * 4096)
    assert bytes(guest.ram[0].page(5)[:6]) == bytes([7]) * 6
    offered.close()
    guest.ram[1].is_elsewhere = True
    with pytest.raises(GuestError, match="'rom' is not here"):
        guest.offer_memory()
    guest.close()
    assert open_count() == before


def unsealable(size: int) -> int:
    fd = os.memfd_create("unsealable")
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize("left", [0, 4096])
def test_memory_that_its_source_takes_away_later_is_a_copy(left: int) -> None:
    before = open_count()
    fd = unsealable(3 * 4096)
    kept = os.dup(fd)
    memory = HandedMemory(CprState((CprEntry("a"),)), [fd])
    mapped = map_handed(fd, 3 * 4096, 4096)
    assert isinstance(mapped, CopiedMemory)
    specs = [RamBlockSpec("a", 3 * 4096, 4096)]
    guest = ParkedGuest.create(GuestIdentity(), specs, lambda *_: mapped)
    os.pwrite(kept, b"first", 0)
    os.pwrite(kept, b"last", 3 * 4096 - 4)
    guest.keep_handed(memory)
    guest.check_unchanged()
    os.ftruncate(kept, left)
    [block] = guest.ram
    # A look at a mapping of it would end this process.
    assert block.memory.view.sum() == sum(b"first") + sum(b"last")
    assert block.present.tolist() == [True, False, True]
    with pytest.raises(GuestError, match=f"'a' is {left} bytes, not 12288"):
        guest.check_unchanged()
    guest.close()
    os.close(kept)
    assert open_count() == before


def test_memory_that_is_gone_before_it_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = unsealable(8192)
    os.pwrite(fd, b"x", 4096)
    memory = map_handed(fd, 8192, 4096)
    assert isinstance(memory, CopiedMemory)
    runs = memory.data_runs()
    os.ftruncate(fd, 4096)
    monkeypatch.setattr(memory, "data_runs", lambda: runs)  # it goes in between
    with pytest.raises(GuestError, match="took memory away"):
        memory.take()
    memory.close()
    os.close(fd)

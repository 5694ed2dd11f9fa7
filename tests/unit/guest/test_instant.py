"""The memory of a real process that goes on writing, as it was at one instant."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from migrationd.errors import GuestError
from migrationd.guest import instant
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.instant import MemoryAtInstant
from migrationd.linux.pagemap import can_scan
from migrationd.linux.userfaultfd import can_serve_faults
from tests.support.deadline import wait_until
from tests.unit.guest.support import Process, attached_program

pytestmark = pytest.mark.skipif(
    not can_serve_faults(), reason="needs Linux 5.19 and a userfaultfd for the kernel's faults too"
)

PAGE = 4096
PROGRAM = """
import sys, time
from migrationd.workload import Workload
workload = Workload("unit")
heap = workload.add_block("heap", 8 << 20)
workload.add_block("spare", 3 * 4096)
pages = 1024  # the other half of the heap is never touched
for page in range(pages):
    heap[page * 4096] = 1
workload.attach(sys.argv[1])
at = 0
while True:
    with workload.active():
        for _ in range(64):
            begin = at * 7 % pages * 4096
            heap[begin] = heap[begin] % 255 + 1
            heap[begin + 4095] = heap[begin]
            at += 1
    time.sleep(0.0005)
"""

Contents = list[npt.NDArray[np.uint8]]


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[tuple[AttachedGuest, Process]]:
    with attached_program(tmp_path, PROGRAM) as both:
        yield both


def heap(guest: AttachedGuest) -> npt.NDArray[np.uint8]:
    """What it has touched."""
    return guest.ram[0].memory.view[: 1024 * PAGE]


def has_changed(guest: AttachedGuest, before: npt.NDArray[np.uint8], pages: int) -> bool:
    """Whether so many pages differ from what they were."""
    differs = (heap(guest) != before).reshape(-1, PAGE).any(axis=1)
    return int(np.count_nonzero(differs)) >= pages


def freeze(guest: AttachedGuest, memory: MemoryAtInstant) -> npt.NDArray[np.uint8]:
    """The instant, and what the heap held then."""
    memory.arm()
    guest.stop()
    memory.freeze()
    before = heap(guest).copy()
    guest.start()
    return before


def collect(guest: AttachedGuest, memory: MemoryAtInstant) -> Contents:
    """What the pieces hold, put together; every page came once."""
    found = [np.zeros(block.used_length, np.uint8) for block in guest.ram]
    seen = [np.zeros(block.page_count, np.int64) for block in guest.ram]
    for piece in memory.pieces():
        assert (np.diff(piece.pages) > 0).all()
        seen[piece.block][piece.pages] += 1
        if piece.content is not None:
            rows = found[piece.block].reshape(-1, PAGE)
            rows[piece.pages] = piece.content[piece.rows]
    assert all((counts == 1).all() for counts in seen)
    return found


def test_what_is_written_since_is_not_in_it(
    attached: tuple[AttachedGuest, Process],
) -> None:
    guest, _ = attached
    resident = guest.present_bytes
    memory = guest.memory_at_instant()
    before = freeze(guest, memory)
    wait_until(lambda: has_changed(guest, before, 1024), "that it wrote every page")
    found = collect(guest, memory)
    assert np.array_equal(found[0][: before.size], before)
    assert not found[0][before.size :].any()
    assert not found[1].any()
    memory.close()
    assert guest.present_bytes == resident, "what was never touched has no memory yet"


def test_what_is_written_while_it_is_read_is_not_in_it(
    attached: tuple[AttachedGuest, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instant, "TAKE_BYTES", 16384)
    guest, _ = attached
    for _ in range(3):
        memory = guest.memory_at_instant()
        before = freeze(guest, memory)
        found = collect(guest, memory)
        memory.close()
        assert np.array_equal(found[0][: before.size], before)


def test_a_guest_that_wrote_nothing_meanwhile_may_write_afterwards(
    attached: tuple[AttachedGuest, Process],
) -> None:
    guest, _ = attached
    memory = guest.memory_at_instant()
    memory.arm()
    guest.stop()
    memory.freeze()
    before = heap(guest).copy()
    found = collect(guest, memory)
    assert np.array_equal(found[0][: before.size], before)
    guest.start()
    wait_until(lambda: has_changed(guest, before, 1024), "that it writes every page")
    memory.close()


def test_a_guest_that_writes_more_than_may_wait_goes_on_when_something_was_sent(
    attached: tuple[AttachedGuest, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instant, "TAKE_BYTES", 4 * PAGE)
    monkeypatch.setattr(instant, "WAITING_SLABS", 4)
    monkeypatch.setattr(instant, "AHEAD_PAGES", 1)
    guest, _ = attached
    memory = guest.memory_at_instant()
    before = freeze(guest, memory)
    wait_until(lambda: has_changed(guest, before, 16), "that it wrote what may wait")
    assert not has_changed(guest, before, 17), "it waits now"
    found = collect(guest, memory)
    assert np.array_equal(found[0][: before.size], before)
    wait_until(lambda: has_changed(guest, before, 1024), "that it goes on")
    memory.close()


def test_one_that_is_given_up_lets_it_go_on(
    attached: tuple[AttachedGuest, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instant, "TAKE_BYTES", PAGE)
    monkeypatch.setattr(instant, "WAITING_SLABS", 1)
    guest, _ = attached
    memory = guest.memory_at_instant()
    before = freeze(guest, memory)
    with pytest.raises(GuestError, match="watched for something else"):
        guest.memory_at_instant().arm()
    wait_until(lambda: has_changed(guest, before, 1), "that it waits")
    memory.close()
    wait_until(lambda: has_changed(guest, before, 1024), "that it goes on")
    if can_scan():
        guest.tracker.start()
        wait_until(lambda: len(guest.tracker.collect()[0]) > 0, "that writes are noted again")


def test_a_guest_that_dies_after_the_instant_is_whole(
    attached: tuple[AttachedGuest, Process],
) -> None:
    guest, process = attached
    memory = guest.memory_at_instant()
    before = freeze(guest, memory)
    wait_until(lambda: has_changed(guest, before, 100), "that it wrote")
    process.kill()
    process.wait()
    found = collect(guest, memory)
    assert np.array_equal(found[0][: before.size], before)
    memory.close()
    with pytest.raises(GuestError, match="userfaultfd: unregister"):
        guest.memory_at_instant().arm()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.errors import GuestError
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec

PAGE = 4096


def make_block(pages: int = 64) -> RamBlock:
    spec = RamBlockSpec("pc.ram", pages * PAGE, PAGE)
    return RamBlock(spec, AnonymousMemory(spec.used_length, PAGE))


def contents(count: int, first: int = 1) -> np.ndarray:
    data = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1)
    return np.broadcast_to(data, (count, PAGE))


def test_placed_pages_are_present() -> None:
    block = make_block()
    block.place_batch(np.arange(3, 6), contents(3), True)
    block.place_batch(np.array([60, 10]), contents(2, 100), False)
    assert np.flatnonzero(block.present).tolist() == [3, 4, 5, 10, 60]
    assert block.present_count == 5
    assert block.page(4)[0] == 2
    assert block.page(10)[PAGE - 1] == 101


def test_zero_pages_are_not_present_and_read_as_zero() -> None:
    block = make_block()
    block.place_batch(np.arange(8), contents(8), True)
    block.zero_batch(np.array([7, 2, 50]))
    assert np.flatnonzero(block.present).tolist() == [0, 1, 3, 4, 5, 6]
    assert not any(block.page(2))
    assert not block.memory.view[2 * PAGE : 3 * PAGE].any()
    assert block.page(1)[0] == 2


def test_a_page_that_is_not_present_reads_as_zero_whatever_the_memory_holds() -> None:
    block = make_block()
    block.memory.place_run(5, contents(1))
    assert not any(block.page(5))


def test_a_single_page_can_be_edited() -> None:
    block = make_block()
    block.write_page(9, b"\x07" * PAGE)
    edited = bytearray(block.page(9))
    edited[0] = 1
    block.write_page(9, edited)
    assert bytes(block.page(9)) == b"\x01" + b"\x07" * (PAGE - 1)


@pytest.mark.parametrize("page", [-1, 64, 1 << 40])
def test_pages_outside_the_block_are_refused_and_nothing_is_placed(page: int) -> None:
    block = make_block()
    numbers = np.array([3, page])
    with pytest.raises(GuestError, match=r"outside RAM block 'pc\.ram' of 64 pages"):
        block.place_batch(numbers, contents(2), False)
    with pytest.raises(GuestError, match="outside"):
        block.zero_batch(numbers)
    with pytest.raises(GuestError, match="outside"):
        block.page(page)
    with pytest.raises(GuestError, match="outside"):
        block.write_page(page, bytes(PAGE))
    assert not block.present.any()
    assert not block.memory.view.any()


def test_empty_batches_are_nothing() -> None:
    block = make_block()
    block.place_batch(np.empty(0, np.int64), np.empty((0, PAGE), np.uint8), True)
    block.zero_batch(np.empty(0, np.int64))
    assert not block.present.any()


@given(st.lists(st.booleans(), min_size=1, max_size=64))
def test_zero_runs_are_what_is_not_present(present: list[bool]) -> None:
    block = make_block(len(present))
    block.present[:] = present
    covered = np.zeros(len(present), np.bool_)
    for first, count in block.zero_runs().tolist():
        assert count > 0
        assert not covered[first : first + count].any()
        covered[first : first + count] = True
    assert (covered == ~block.present).all()


def test_giving_zeros_back_changes_nothing_that_can_be_read() -> None:
    block = make_block(1024)
    block.place_batch(np.array([0, 700]), contents(2), False)
    before = block.memory.view.copy()
    block.give_back_zeros()
    assert (block.memory.view == before).all()


def test_which_pages_came_is_kept_once_somebody_asks() -> None:
    block = make_block(16)
    assert block.missing_count == 0
    block.track_received()
    assert block.missing_count == 16
    block.place_batch(np.arange(3, 6), contents(3), True)
    block.place_batch(np.array([9, 1]), contents(2), False)
    block.zero_batch(np.array([7, 3]))
    buffer = bytearray(b"m" * PAGE)
    block.place_mixed([12, 13], [0, -1], buffer)
    assert block.received is not None
    assert np.flatnonzero(block.received).tolist() == [1, 3, 4, 5, 7, 9, 12, 13]
    assert np.flatnonzero(block.present).tolist() == [1, 4, 5, 9, 12]
    assert block.missing_count == 8


def test_discarded_pages_are_zero_and_did_not_come() -> None:
    block = make_block(16)
    block.track_received()
    block.place_batch(np.arange(16), contents(16), True)
    block.discard(np.array([[4, 8], [0, 0]]))
    assert np.flatnonzero(block.present).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert block.missing_count == 8
    assert not block.memory.view[4 * PAGE : 12 * PAGE].any()
    assert block.page(12)[0] == 13
    for first, count in ((16, 1), (15, 2), (-1, 1)):
        with pytest.raises(GuestError, match="outside RAM block"):
            block.discard(np.array([[0, 1], [first, count]]))


def test_many_runs_are_discarded_as_few_are() -> None:
    block = make_block(64)
    block.track_received()
    block.place_batch(np.arange(64), contents(64), True)
    block.discard(np.array([[2 * n, 1] for n in range(32)]))
    assert np.flatnonzero(block.present).tolist() == list(range(1, 64, 2))
    assert block.missing_count == 32
    # Runs that overlap may name more pages than there are.
    block.discard(np.array([[0, 63]] * 1000))
    assert np.flatnonzero(block.present).tolist() == [63]


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 64, 1000])
def test_a_bitmap_is_counted_packed_and_read_unpacked(pages: int) -> None:
    present = np.random.default_rng(pages).random(pages) < 0.5
    block = RamBlock(RamBlockSpec("b", pages * 4096, 4096), AnonymousMemory(pages * 4096, 4096))
    block.use_bitmap(np.packbits(present, bitorder="little"))
    assert block.present_count == np.count_nonzero(present)
    assert np.array_equal(block.present, present)
    block.present = ~present
    assert block.present_count == pages - np.count_nonzero(present)

import gc
import re
from pathlib import Path

import numpy as np

from migrationd.guest.memory import HUGE_PAGE_BYTES, AnonymousMemory
from migrationd.guest.ready_memory import ReadyMemory

PAGE = 4096


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_it_is_resident_before_a_guest_comes_and_its_blocks_cost_nothing_more() -> None:
    before = resident_bytes()
    ready = ReadyMemory(64 << 20)
    ready.make_ready()
    assert resident_bytes() - before > 56 << 20
    full = resident_bytes()
    block = ready.take(48 << 20, PAGE)
    block.view[::PAGE] = 7
    assert resident_bytes() - full < 8 << 20
    block.close()


def test_blocks_are_apart_and_large_ones_begin_at_huge_pages() -> None:
    ready = ReadyMemory(16 << 20)
    small, large = ready.take(3 * PAGE, PAGE), ready.take(4 << 20, PAGE)
    small.view[:] = 1
    large.view[:] = 2
    assert small.view.min() == 1
    assert large.view.__array_interface__["data"][0] % HUGE_PAGE_BYTES == (
        small.view.__array_interface__["data"][0] % HUGE_PAGE_BYTES
    )
    large.place_scattered([1], [0], bytearray(b"\3" * PAGE))
    assert large.view[PAGE : 2 * PAGE].min() == 3
    assert large.view[0] == 2


def test_what_does_not_fit_comes_from_elsewhere() -> None:
    ready = ReadyMemory(4 << 20)
    inside, outside = ready.take(3 << 20, PAGE), ready.take(3 << 20, PAGE)
    assert type(inside) is not AnonymousMemory
    assert type(outside) is AnonymousMemory
    outside.view[:] = 1
    assert not inside.view.any()


def test_the_next_guest_finds_zeros() -> None:
    ready = ReadyMemory(4 << 20)
    first, second = ready.take(1 << 20, PAGE), ready.take(1 << 20, PAGE)
    first.view[:] = 1
    second.view[:] = 2
    first.close()
    first.close()
    assert second.view.min() == 2
    second.close()
    gc.collect()
    assert not ready.take(4 << 20, PAGE).view.any()


def test_the_rest_is_given_back_when_the_guest_is_there() -> None:
    ready = ReadyMemory(128 << 20)
    ready.make_ready()
    full = resident_bytes()
    block = ready.take(16 << 20, PAGE)
    block.view[:] = 5
    ready.give_back_rest()
    assert full - resident_bytes() > 96 << 20
    assert block.view.min() == 5


def test_zero_pages_of_a_block_are_given_back_and_its_neighbours_stay() -> None:
    ready = ReadyMemory(16 << 20)
    first, second = ready.take(4 << 20, PAGE), ready.take(4 << 20, PAGE)
    first.view[:] = 1
    second.view[:] = 2
    second.give_back(np.array([[0, 512]]))
    assert first.view.min() == 1
    assert not second.view[: 512 * PAGE].any()
    assert second.view[512 * PAGE :].min() == 2


def test_what_is_taken_meanwhile_is_left_alone() -> None:
    ready = ReadyMemory(8 << 20)
    block = ready.take(1 << 20, PAGE)
    before = resident_bytes()
    ready.make_ready()
    assert resident_bytes() - before < 4 << 20
    block.close()
    ready.close()
    ready.make_ready()
    assert resident_bytes() - before < 4 << 20

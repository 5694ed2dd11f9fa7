"""Huge pages are shown when they are whole; here each is of sixteen pages of the host."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from migrationd.errors import GuestError
from tests.unit.guest.test_workload_block import PAGE, Here, content

HUGE = 16


@pytest.fixture
def here() -> Iterator[Here]:
    try:
        made = Here(HUGE)
    except GuestError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_it_is_shown_with_its_last_page(here: Here) -> None:
    here.watch()
    result = here.read(37)
    assert here.wanted() == [37]
    here.block.place_batch(np.arange(40, 48), content(4).repeat(8, 0), True)
    here.block.place_batch(np.array([32, 34, 36]), content(3).repeat(3, 0), False)
    here.block.place_mixed([33, 35], [8, -1], bytearray(8) + bytearray(b"x" * PAGE))
    here.block.zero_batch(np.array([38, 39]))
    assert not here.block.has_come(37)
    assert not here.block.has_come(32), "it came, but cannot be shown alone"
    here.block.place_batch(np.array([37]), content(7), True)
    assert result() == bytes([7]) * PAGE
    for page, byte in ((32, 3), (33, ord("x")), (35, 0), (39, 0), (47, 4)):
        assert here.block.has_come(page)
        assert here.read(page)() == bytes([byte]) * PAGE
    assert not here.block.has_come(48)
    assert here.reader.read() == []


def test_one_that_is_zero_and_was_never_touched(here: Here) -> None:
    here.watch()
    result = here.read(0)
    assert here.wanted() == [0]
    here.block.zero_batch(np.arange(HUGE))
    assert result() == bytes(PAGE)


def test_a_run_over_several_shows_the_whole_ones(here: Here) -> None:
    here.watch()
    here.block.place_batch(np.arange(10, 40), content(5).repeat(30, 0), True)
    assert [here.block.has_come(page) for page in (0, 16, 32)] == [False, True, False]
    assert here.read(31)() == bytes([5]) * PAGE
    assert here.reader.read() == []


def test_what_came_before_is_shown_when_it_is_wanted(here: Here) -> None:
    here.block.place_batch(np.arange(16, 32), content(3).repeat(16, 0), True)
    here.watch()
    result = here.read(20)
    assert here.wanted() == [20]
    here.block.show_again(20, 64)
    here.block.show_again(20, 64)
    assert result() == bytes([3]) * PAGE


def test_urgent_pages_one_by_one(here: Here) -> None:
    with pytest.raises(GuestError, match="before it was asked for"):
        here.block.place_page(3, -1)
    here.watch()
    result = here.read(3)
    data = ctypes.create_string_buffer(b"3" * PAGE, PAGE)
    for page in range(HUGE):
        assert not here.block.has_come(3)
        here.block.place_page(page, ctypes.addressof(data) if page == 3 else -1)
    assert result() == b"3" * PAGE
    assert here.placed == 1
    with pytest.raises(GuestError, match="came twice"):
        here.block.place_page(3, -1)


def test_it_is_discarded_whole(here: Here) -> None:
    here.block.place_batch(np.arange(16, 32), content(3).repeat(16, 0), True)
    for first, count in ((16, 8), (24, 16), (17, 15)):
        with pytest.raises(GuestError, match="no whole huge pages"):
            here.block.discard(np.array([[first, count]]))
    here.block.discard(np.array([[16, 16], [0, 0]]))
    here.watch()
    result = here.read(16)
    assert here.wanted() == [16]
    here.block.place_batch(np.arange(16, 32), content(4).repeat(16, 0), True)
    assert result() == bytes([4]) * PAGE

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest.memory import (
    AnonymousMemory,
    FileMemory,
    Memory,
    data_runs,
    page_runs,
    united,
)

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, (1 << 20) + 512 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture(params=["anonymous", "file"])
def memory(request: pytest.FixtureRequest, file: int) -> Iterator[Memory]:
    made: Memory
    if request.param == "anonymous":
        made = AnonymousMemory(512 * PAGE, PAGE)
    else:
        made = FileMemory(file, 1 << 20, 512 * PAGE, PAGE)
    yield made
    made.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Pages as they stand in a receive buffer: at a distance of a page and a header."""
    buffer = np.random.default_rng(seed).integers(1, 255, (count, PAGE + 8), np.uint8)
    return buffer[:, 8:]


def test_a_run_is_placed_from_a_strided_source(memory: Memory) -> None:
    data = rows(100)
    memory.place_run(7, data)
    assert (memory.view[7 * PAGE : 107 * PAGE].reshape(-1, PAGE) == data).all()
    assert not memory.view[: 7 * PAGE].any()
    assert not memory.view[107 * PAGE :].any()


def test_scattered_pages_are_placed_each_at_its_number(memory: Memory) -> None:
    pages = np.array([3, 4, 5, 100, 9, 511, 0])
    data = rows(len(pages))
    memory.place_pages(pages, data)
    assert (memory.view.reshape(-1, PAGE)[pages] == data).all()
    assert np.count_nonzero(memory.view.reshape(-1, PAGE).any(axis=1)) == len(pages)


def test_the_last_content_of_a_page_that_is_named_twice_stays(memory: Memory) -> None:
    data = rows(3)
    memory.place_pages(np.array([8, 20, 8]), data)
    assert (memory.view.reshape(-1, PAGE)[8] == data[2]).all()


def test_a_zeroed_page_reads_as_zero_and_its_neighbours_stay(memory: Memory) -> None:
    data = rows(10)
    memory.place_run(0, data)
    memory.zero_pages(np.array([6, 2, 3]))
    kept = [0, 1, 4, 5, 7, 8, 9]
    assert not memory.view.reshape(-1, PAGE)[[2, 3, 6]].any()
    assert (memory.view.reshape(-1, PAGE)[kept] == data[kept]).all()


def test_giving_back_keeps_what_is_present(memory: Memory) -> None:
    data = rows(2)
    memory.place_run(0, data[:1])
    memory.place_run(300, data[1:])
    memory.give_back(np.array([[1, 299], [301, 211]]))
    assert (memory.view.reshape(-1, PAGE)[[0, 300]] == data).all()
    assert not memory.view.reshape(-1, PAGE)[1:300].any()


def resident_bytes(memory: AnonymousMemory) -> int:
    address = memory.view.__array_interface__["data"][0]
    found = 0
    with open("/proc/self/smaps") as smaps:
        inside = False
        for line in smaps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(text, 16) for text in head.split("-"))
                inside = low < address + memory.view.size and high > address
            elif inside and head == "Rss:":
                found += int(line.split()[1]) << 10
    return found


def test_what_was_never_placed_costs_no_memory() -> None:
    memory = AnonymousMemory(64 << 20, PAGE)
    before = resident_bytes(memory)
    memory.place_run(0, rows(512))
    assert resident_bytes(memory) - before <= 2 << 20
    memory.close()


def test_memory_that_is_given_back_is_not_resident() -> None:
    memory = AnonymousMemory(16 << 20, PAGE)
    for first in range(0, 4096, 512):
        memory.place_run(first, rows(512))
    before = resident_bytes(memory)
    memory.give_back(np.array([[1, 4095]]))
    assert before - resident_bytes(memory) > 15 << 20
    memory.close()


def test_zeroed_pages_of_a_file_are_holes(file: int) -> None:
    memory = FileMemory(file, 0, 512 * PAGE, PAGE)
    memory.place_run(0, rows(512))
    os.fsync(file)
    before = os.fstat(file).st_blocks
    memory.zero_pages(np.arange(100, 500))
    assert before - os.fstat(file).st_blocks >= 300 * PAGE // 512
    memory.close()


def test_a_pages_area_may_begin_at_any_target_page(file: int) -> None:
    position = mmap.PAGESIZE + 1024
    os.pwrite(file, b"x" * 1024, position + 2048)
    memory = FileMemory(file, position, 8 * 1024, 1024)
    assert bytes(memory.view[2048:3072]) == b"x" * 1024
    assert not memory.view[:2048].any()
    memory.close()


def test_pages_that_the_disk_must_be_asked_for_are_told_from_others(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    path.write_bytes(bytes(range(256)) * (64 * PAGE // 256))
    fd = os.open(path, os.O_RDONLY)
    memory = FileMemory(fd, 0, 64 * PAGE, PAGE)
    pages = np.array([3, 40])
    assert memory.is_at_hand(pages)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not memory.is_at_hand(pages):  # a file system in memory forgets nothing
        memory.prefetch(page_runs(pages))
        deadline = time.monotonic() + 10
        while not memory.is_at_hand(pages):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    memory.close()
    os.close(fd)


def test_an_area_outside_its_file_is_refused(file: int) -> None:
    with pytest.raises(GuestError, match="file ends before"):
        FileMemory(file, 1 << 20, 513 * PAGE, PAGE)


def test_more_memory_than_there_are_addresses_is_refused() -> None:
    with pytest.raises(GuestError, match="cannot map"):
        AnonymousMemory(1 << 62, PAGE)


def test_a_file_that_cannot_be_written_is_a_guest_error(tmp_path: Path) -> None:
    path = tmp_path / "read-only"
    path.write_bytes(bytes(16 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    memory = FileMemory(fd, 0, 16 * PAGE, PAGE)
    for place in (
        lambda: memory.place_run(0, rows(2)),
        lambda: memory.place_pages(np.array([1, 5]), rows(2)),
        lambda: memory.zero_pages(np.array([3])),
    ):
        with pytest.raises(GuestError, match="writing the guest's file"):
            place()
    memory.close()
    os.close(fd)


def test_an_empty_block_has_memory_of_no_bytes(file: int) -> None:
    memory = FileMemory(file, 0, 0, PAGE)
    assert not memory.view.size
    memory.close()


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([], []),
        ([5], [[5, 1]]),
        ([1, 2, 3], [[1, 3]]),
        ([0, 2, 3, 9], [[0, 1], [2, 2], [9, 1]]),
    ],
)
def test_page_runs(pages: list[int], runs: list[list[int]]) -> None:
    assert page_runs(np.array(pages, np.int64)).tolist() == runs


def test_pages_of_a_mixed_row_come_from_their_places_in_the_buffer(memory: Memory) -> None:
    buffer = bytearray(b"\x01" * 17 + b"a" * PAGE + b"\x02" * 9 + b"b" * PAGE)
    memory.place_scattered((30, 7), (17, 17 + PAGE + 9), buffer)
    pages = memory.view.reshape(-1, PAGE)
    assert (pages[30] == ord("a")).all()
    assert (pages[7] == ord("b")).all()
    assert np.count_nonzero(pages.any(axis=1)) == 2


def test_pages_are_read_in_any_order(memory: Memory) -> None:
    data = rows(512)
    memory.place_run(0, data)
    pages = np.array([3, 4, 5, 100, 9, 511, 0])
    read = memory.read(pages)
    assert (read == data[pages]).all()
    read[:] = 0
    assert (memory.read(pages) == data[pages]).all(), "a copy"


def test_a_file_that_was_cut_short_is_read_up_to_there(file: int) -> None:
    memory = FileMemory(file, 1 << 20, 512 * PAGE, PAGE)
    data = rows(512)
    memory.place_run(0, data)
    os.ftruncate(file, (1 << 20) + 100 * PAGE)
    assert (memory.read(np.arange(90, 100)) == data[90:100]).all()
    with pytest.raises(GuestError, match="cut short while it was read"):
        memory.read(np.arange(90, 101))
    memory.close()


def test_it_outlives_the_descriptor_that_it_was_made_with(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8 * PAGE)
    memory = FileMemory(fd, 0, 8 * PAGE, PAGE)
    data = rows(8)
    memory.place_run(0, data)
    os.close(fd)
    other = os.open("/dev/null", os.O_RDONLY)  # the same number, most likely
    assert (memory.read(np.arange(8)) == data).all()
    assert memory.is_at_hand(np.arange(8))
    memory.close()
    memory.close()
    os.close(other)


@pytest.mark.parametrize(
    ("one", "other"), [([], []), ([3], []), ([], [3, 4]), ([1, 5, 9], [0, 5, 6, 9]), ([2], [2])]
)
def test_united(one: list[int], other: list[int]) -> None:
    pages = united(np.array(one, np.int64), np.array(other, np.int64))
    assert pages.tolist() == sorted({*one, *other})
    assert pages.dtype == np.int64


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([], []),
        ([0, 1, 2, 3], [[0, 4]]),
        ([1, 3], [[1, 1], [3, 1]]),
    ],
    ids=["never touched", "no hole", "holes"],
)
def test_what_was_touched_of_a_memfd(pages: list[int], runs: list[list[int]]) -> None:
    fd = os.memfd_create("touched")
    try:
        os.ftruncate(fd, 4 * mmap.PAGESIZE)
        for page in pages:
            os.pwrite(fd, b"x", page * mmap.PAGESIZE)
        assert data_runs(fd, 4 * mmap.PAGESIZE, mmap.PAGESIZE).tolist() == runs
    finally:
        os.close(fd)


def test_the_first_union_imports_nothing() -> None:
    program = """
import sys
import numpy as np
from migrationd.guest.memory import united
before = set(sys.modules)
assert len(united(np.arange(4), np.arange(9))) == 9
print(sorted(set(sys.modules) - before))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

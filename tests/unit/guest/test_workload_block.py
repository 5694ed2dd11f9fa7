"""Pages that come to a process which runs without them; the process is this one."""

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest.huge_block import workload_block
from migrationd.guest.memory import SharedMemory
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.linux.faults import FaultReader
from migrationd.linux.pagemap import WrittenScanner
from migrationd.linux.userfaultfd import (
    FEATURE_MINOR_SHMEM,
    FEATURE_MISSING_SHMEM,
    FEATURE_THREAD_ID,
    MODE_MINOR,
    MODE_MISSING,
    open_userfaultfd,
    register,
    unregister,
)
from tests.support.deadline import wait_until

PAGE = mmap.PAGESIZE
PAGES = 256

memcpy = ctypes.CDLL(None).memcpy  # lets other threads run while it waits for a page
memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Here:
    """A block, and the same memory as the workload sees it.

    Args:
        host_pages: Pages that are shown together, as if they were a huge one.
    """

    def __init__(self, host_pages: int | None = None) -> None:
        fd = os.memfd_create("block", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGES * PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.fd = fd
        self.mapping = mmap.mmap(fd, PAGES * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.faults = open_userfaultfd(
            FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM | FEATURE_THREAD_ID
        )
        self.reader = FaultReader(self.faults)
        self.placed = 0
        memory = SharedMemory(fd, PAGES * PAGE, PAGE)
        host_bytes = host_pages * PAGE if host_pages is not None else None
        spec = RamBlockSpec("heap", PAGES * PAGE, PAGE, backing_page_size=host_bytes)
        self.block = workload_block(spec, memory, self.address)
        self.block.track_received()

    def watch(self, scanner: WrittenScanner | None = None) -> None:
        register(self.faults, self.address, PAGES * PAGE, MODE_MISSING | MODE_MINOR)
        self.block.show_pages(self.faults, self._count, scanner)

    def close(self) -> None:
        unregister(self.faults, self.address, PAGES * PAGE)
        self.reader.close()
        os.close(self.faults)
        os.close(self.fd)

    def read(self, page: int) -> "Callable[[], bytes]":
        """Begin to read a page; the result waits for its content."""
        out = ctypes.create_string_buffer(PAGE)
        thread = threading.Thread(
            target=memcpy, args=(ctypes.addressof(out), self.address + page * PAGE, PAGE)
        )
        thread.start()

        def result() -> bytes:
            thread.join(5)
            assert not thread.is_alive(), "the page is not shown"
            return out.raw

        return result

    def wanted(self) -> list[int]:
        """Pages that are waited for."""
        found: list[int] = []

        def look() -> bool:
            found.extend((address - self.address) // PAGE for address, _ in self.reader.read())
            return bool(found)

        wait_until(look, "a fault")
        return found

    def _count(self, page: int | None) -> None:
        self.placed += 1


@pytest.fixture
def here() -> Iterator[Here]:
    try:
        made = Here()
    except GuestError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def content(number: int) -> np.ndarray:
    return np.full((1, PAGE), number, np.uint8)


def test_a_page_that_is_waited_for_comes_whole(here: Here) -> None:
    here.watch()
    result = here.read(5)
    assert here.wanted() == [5]
    here.block.place_batch(np.array([5]), content(7), True)
    assert result() == bytes([7]) * PAGE
    assert here.placed == 1
    assert here.block.received is not None
    assert here.block.received.nonzero()[0].tolist() == [5]


@pytest.mark.parametrize(
    "pages", [[10, 11, 12, 13], [20, 21, 40, 50, 51], [13, 12, 11, 10], [21, 20, 40, 52, 51, 7]]
)
def test_batches_are_shown_where_they_belong(here: Here, pages: list[int]) -> None:
    here.watch()
    data = np.arange(len(pages), dtype=np.uint8).repeat(PAGE + 8).reshape(-1, PAGE + 8)[:, 8:]
    here.block.place_batch(np.array(pages), data, pages[-1] - pages[0] == len(pages) - 1)
    for number, page in enumerate(pages):
        assert here.read(page)() == bytes([number]) * PAGE
    assert here.reader.read() == []


def test_short_rows_with_zero_pages(here: Here) -> None:
    here.watch()
    waits = here.read(31)
    assert here.wanted() == [31]
    here.block.place_mixed([30, 31], [8, -1], bytearray(8) + bytearray(b"x" * PAGE))
    assert waits() == bytes(PAGE)
    assert here.read(30)() == b"x" * PAGE
    here.block.zero_batch(np.array([70, 71, 90]))
    assert here.read(90)() == bytes(PAGE)
    assert here.reader.read() == []


def test_a_second_copy_is_refused(here: Here) -> None:
    here.watch()
    here.block.place_batch(np.array([5]), content(7), True)
    for again in (
        lambda: here.block.place_batch(np.array([4, 5]), content(8).repeat(2, 0), True),
        lambda: here.block.zero_batch(np.array([5])),
        lambda: here.block.place_mixed([6, 6], [-1, -1], bytearray(PAGE)),
    ):
        with pytest.raises(GuestError, match="came twice"):
            again()
    assert here.read(5)() == bytes([7]) * PAGE


def test_what_came_before_is_shown_with_what_is_around_it(here: Here) -> None:
    here.block.place_batch(np.arange(8, 16), content(3).repeat(8, 0), True)
    here.block.zero_batch(np.arange(16, 20))
    here.watch()
    for page, expected in ((9, 3), (17, 0)):
        result = here.read(page)
        assert here.wanted() == [page]
        here.block.show_again(page, 64)
        assert result() == bytes([expected]) * PAGE
    for page in (8, 15, 16, 19):
        here.read(page)()
    assert here.reader.read() == []


def test_a_discarded_page_is_missing_again(here: Here) -> None:
    here.block.place_batch(np.arange(8, 16), content(3).repeat(8, 0), True)
    here.block.discard(np.array([[10, 2]]))
    here.watch()
    result = here.read(10)
    assert here.wanted() == [10]
    assert here.block.received is not None
    assert not here.block.received[10]
    here.block.place_batch(np.array([10]), content(4), True)
    assert result() == bytes([4]) * PAGE


def test_a_discarded_page_is_missing_where_the_workload_has_seen_it(here: Here) -> None:
    here.block.place_batch(np.arange(8, 16), content(3).repeat(8, 0), True)
    assert here.read(11)() == bytes([3]) * PAGE
    here.block.discard(np.array([[10, 3]]))
    with open("/proc/self/pagemap", "rb") as pagemap:
        scanner = WrittenScanner(pagemap.fileno())
        ((begin, end),) = scanner.mapped(here.address, PAGES * PAGE).tolist()
        assert begin <= here.address + 11 * PAGE < end <= here.address + 16 * PAGE
        here.watch(scanner)
    for page in (10, 11):
        result = here.read(page)
        assert here.wanted() == [page]
        here.block.place_batch(np.array([page]), content(4), True)
        assert result() == bytes([4]) * PAGE


def test_a_discarded_page_that_does_not_come_again_is_zero(here: Here) -> None:
    here.block.place_batch(np.arange(8, 16), content(3).repeat(8, 0), True)
    here.block.discard(np.array([[8, 4]]))
    here.watch()
    result = here.read(8)
    assert here.wanted() == [8]
    here.block.zero_batch(np.array([8]))  # as a zero page
    assert result() == bytes(PAGE)
    here.block.place_batch(np.array([9]), content(4), True)
    here.block.show_no_pages()  # not at all
    unregister(here.faults, here.address, PAGES * PAGE)
    for page, expected in ((8, 0), (9, 4), (10, 0), (11, 0), (12, 3)):
        assert here.read(page)() == bytes([expected]) * PAGE


def test_discarded_pages_of_a_guest_that_does_not_run_yet(here: Here) -> None:
    here.block.place_batch(np.arange(8, 16), content(3).repeat(8, 0), True)
    here.block.discard(np.array([[8, 4]]))
    here.block.zero_batch(np.array([8]))
    here.block.place_batch(np.array([9]), content(4), True)
    here.block.settle_discarded()
    for page, expected in ((8, 0), (9, 4), (10, 0), (11, 0), (12, 3)):
        assert here.read(page)() == bytes([expected]) * PAGE


def test_a_page_that_is_there_although_it_did_not_come_is_replaced(here: Here) -> None:
    os.pwrite(here.fd, b"old" * 1000, 5 * PAGE)
    here.watch()
    here.block.place_batch(np.array([5]), content(9), True)
    assert here.read(5)() == bytes([9]) * PAGE


def test_urgent_pages_one_by_one(here: Here) -> None:
    with pytest.raises(GuestError, match="before it was asked for"):
        here.block.place_page(3, -1)
    here.watch()
    content_of_3 = ctypes.create_string_buffer(b"3" * PAGE, PAGE)
    results = [here.read(page) for page in (3, 4)]
    here.block.place_page(3, ctypes.addressof(content_of_3))
    here.block.place_page(4, -1)
    assert [result() for result in results] == [b"3" * PAGE, bytes(PAGE)]
    for page in (3, 4):
        assert here.block.has_come(page)
        with pytest.raises(GuestError, match="came twice"):
            here.block.place_page(page, -1)

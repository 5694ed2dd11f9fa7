"""Writes to shared and to anonymous memory, noted by the kernel."""

import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest.dirty import NoTracker, PagemapTracker
from migrationd.guest.memory import AnonymousMemory, Bytes, MappedMemory, SharedMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.linux.iovec import address_of
from migrationd.linux.pagemap import can_scan
from migrationd.linux.userfaultfd import ASYNC_TRACKING, MODE_WP, open_userfaultfd, register

PAGE = 4096
PAGES = 2048
TOUCHED = 1024


class Area(NamedTuple):
    """Memory of this process whose writes are tracked: 8 MiB, the first half touched."""

    view: Bytes
    tracker: PagemapTracker

    def write(self, *pages: int) -> None:
        """Write a byte of each page."""
        self.view[np.array(pages) * PAGE + 8] += 1

    def found(self) -> list[int]:
        """Pages that were written since the last look."""
        [pages] = self.tracker.collect()
        return list(pages.tolist())


def memory_of(kind: str, size: int) -> MappedMemory:
    if kind == "anonymous, in huge pages":
        return AnonymousMemory(size, PAGE)
    if kind == "anonymous":
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        return MappedMemory(area, size, PAGE)
    fd = os.memfd_create("unit", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        return SharedMemory(fd, size, PAGE)
    finally:
        os.close(fd)


@pytest.fixture(params=["memfd", "anonymous", "anonymous, in huge pages"])
def area(request: pytest.FixtureRequest) -> Iterator[Area]:
    if not can_scan():
        pytest.skip("needs Linux 6.7")
    size = PAGES * PAGE
    memory = memory_of(request.param, size)
    memory.view[: TOUCHED * PAGE] = 1
    address = address_of(memory.view)
    userfaultfd = open_userfaultfd(ASYNC_TRACKING)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        register(userfaultfd, address, size, MODE_WP)
        block = RamBlock(RamBlockSpec("heap", size, PAGE), memory)
        tracker = PagemapTracker(pagemap, [(block, address)])
        tracker.start()
        yield Area(memory.view, tracker)
        tracker.stop()
    finally:
        os.close(pagemap)
        os.close(userfaultfd)


def test_each_write_is_found_once(area: Area) -> None:
    assert area.found() == []
    area.write(900, 5, 300, 5)
    assert area.tracker.peek() == 3 * PAGE
    assert area.found() == [5, 300, 900]
    assert area.found() == []
    area.write(5)
    assert area.found() == [5]


def test_the_first_write_ever_is_found_too(area: Area) -> None:
    area.write(TOUCHED, 1500, PAGES - 1)
    assert area.found() == [TOUCHED, 1500, PAGES - 1]
    area.write(1500, 1501)
    assert area.found() == [1500, 1501]


def test_a_read_is_no_write(area: Area) -> None:
    assert int(area.view[::PAGE].sum()) == TOUCHED
    assert area.found() == []
    area.write(1600)
    assert area.found() == [1600]


def test_a_new_start_forgets(area: Area) -> None:
    area.write(*range(PAGES))
    area.tracker.start()
    assert area.found() == []
    area.write(7)
    assert area.found() == [7]


def test_memory_that_nobody_watches_is_an_error() -> None:
    if not can_scan():
        pytest.skip("needs Linux 6.7")
    memory = memory_of("anonymous", PAGE)
    block = RamBlock(RamBlockSpec("heap", PAGE, PAGE), memory)
    with open("/proc/self/pagemap", "rb") as pagemap:
        tracker = PagemapTracker(pagemap.fileno(), [(block, address_of(memory.view))])
        with pytest.raises(GuestError, match="PAGEMAP_SCAN"):
            tracker.start()


def test_without_a_pagemap_nothing_is_tracked() -> None:
    tracker = NoTracker()
    for ask in (tracker.start, tracker.collect, tracker.peek):
        with pytest.raises(GuestError, match="tracked"):
            ask()
    tracker.stop()

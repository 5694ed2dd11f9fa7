"""A RAM block in the memory of a workload, which may run before its pages are there.

While it does, a page is placed once only: a second copy would undo what the workload has
written since. It is written first, then counted as received, then shown to the workload, so
that whoever waits for it finds it whole.

Reference: ``linux/page_faults.py``; one copy of each page, stream format 6.4.
"""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.guest.memory import Bytes, Pages, SharedMemory, distinct, page_runs
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.linux.iovec import address_of
from migrationd.linux.page_faults import copy_page, map_pages, zero_pages
from migrationd.linux.pagemap import WrittenScanner


class WorkloadBlock(RamBlock):
    """A block that a workload has mapped.

    Args:
        spec: Name and size.
        memory: Its memory, mapped here as well.
        address: Where the workload has mapped it.

    Attributes:
        address_there: The same.
        host_pages: Target pages of one page of its memory.
    """

    memory: SharedMemory
    host_pages = 1

    def __init__(self, spec: RamBlockSpec, memory: SharedMemory, address: int) -> None:
        super().__init__(spec, memory)
        self.address_there = address
        self._userfaultfd = -1
        self._on_placed: Callable[[int | None], None] = lambda _: None
        self._came = memoryview(b"")
        self._discarded: npt.NDArray[np.bool_] | None = None

    def show_pages(
        self,
        userfaultfd: int,
        on_placed: Callable[[int | None], None],
        scanner: WrittenScanner | None = None,
    ) -> None:
        """From now on show the workload each page as it comes; it waits for the others.

        Args:
            userfaultfd: Of the workload, registered for this block; not owned.
            on_placed: Called after pages were placed, on the thread that did it, with the page if
                it was one.
            scanner: Of the workload's pages; None if nobody knows what it has mapped.

        Raises:
            GuestError: The workload is gone.
        """
        assert self.received is not None
        if self._discarded is not None:
            self._unmap_discarded(scanner)
        self._came = self.received.data.cast("B")
        self._on_placed = on_placed
        self._userfaultfd = userfaultfd

    def show_no_pages(self) -> None:
        """The workload sees all memory as it is again: what did not come is zero.

        Raises:
            GuestError: The memory cannot be given back.
        """
        self.settle_discarded()
        self._userfaultfd = -1

    def settle_discarded(self) -> None:
        """Make pages zero that were discarded and did not come again.

        Raises:
            GuestError: As :meth:`show_no_pages`.
        """
        if self._discarded is not None:
            self._forget(np.flatnonzero(self._discarded))
            self._discarded = None

    def place_batch(self, pages: Pages, data: Bytes, is_run: bool) -> None:
        """See :class:`RamBlock`.

        Raises:
            GuestError: As there, or a page came before, or the workload is gone.
        """
        if self._userfaultfd < 0:
            super().place_batch(pages, data, is_run)
            return
        if not len(pages):
            return
        if is_run:
            self._check(int(pages[0]), int(pages[-1]))
            self._refuse_second_run(int(pages[0]), len(pages))
        else:
            self._check(int(pages.min()), int(pages.max()))
            self._refuse_second(pages)
        if len(pages) == 1:
            self._place_one(int(pages[0]), address_of(data[0]))
        elif is_run:
            self._place_run(int(pages[0]), data)
        else:
            self._place_runs(pages, data)
        self._on_placed(None)

    def place_page(self, page: int, source: int) -> None:
        """Place and show one page, the fastest way; only after :meth:`show_pages`.

        Args:
            page: Its number, in the block.
            source: Address of its content here; -1 for a zero page.

        Raises:
            GuestError: As :meth:`place_batch`, or too early.
        """
        self._refuse_early(page)
        if self._came[page]:
            raise self._second(page)
        if source < 0:
            self._zero_run(page, 1)
        else:
            self._place_one(page, source)
        self._tell_placed(page)

    def _tell_placed(self, page: int) -> None:
        self._on_placed(page)

    def has_come(self, page: int) -> bool:
        """Whether a page was received; only after :meth:`show_pages`."""
        return self._came[page] != 0

    def place_mixed(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """See :class:`RamBlock`; raises as :meth:`place_batch`."""
        if self._userfaultfd < 0:
            super().place_mixed(pages, content_at, buffer)
            return
        self._check(min(pages), max(pages))
        self._refuse_second(list(pages))
        begin = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for page, at in zip(pages, content_at, strict=True):
            if at >= 0:
                self._place_one(page, begin + at)
            else:
                self._zero_run(page, 1)
        self._on_placed(None)

    def zero_batch(self, pages: Pages) -> None:
        """See :class:`RamBlock`; raises as :meth:`place_batch`."""
        if self._userfaultfd < 0:
            if self._discarded is not None and len(pages):
                self._check(int(pages.min()), int(pages.max()))
                self._forget(distinct(pages[self._discarded[pages]]))
            super().zero_batch(pages)
            return
        if not len(pages):
            return
        self._check(int(pages.min()), int(pages.max()))
        self._refuse_second(pages)
        for first, count in page_runs(np.sort(pages)).tolist():
            self._zero_run(first, count)
        self._on_placed(None)

    def discard(self, runs: Pages) -> None:
        """See :class:`RamBlock`.

        The source's guest stands still meanwhile, so that the memory is not given back now:
        nearly all of it is about to be written again. A page that did not come is never shown.
        """
        if self._discarded is None:
            self._discarded = np.zeros(self.page_count, np.bool_)
        self.track_received()
        assert self.received is not None
        for pages in self._indexes(runs):
            self._discarded[pages] |= self.present[pages]
            self.present[pages] = False
            self.received[pages] = False

    def show_again(self, page: int, most: int) -> None:
        """Map what came already and is not mapped: a page, and received ones around it.

        Args:
            page: A page that was received.
            most: Pages around it, a power of two.

        Raises:
            GuestError: The workload is gone.
        """
        assert self.received is not None
        low = page & -most
        here = self.received[low : low + most] & (
            self.present[low : low + most] == self.present[page]
        )
        gaps = np.flatnonzero(~here) + low
        at = int(np.searchsorted(gaps, page))
        first = int(gaps[at - 1]) + 1 if at else low
        end = int(gaps[at]) if at < len(gaps) else low + len(here)
        self._map(first, end - first)

    def _refuse_early(self, page: int) -> None:
        if self._userfaultfd < 0:
            raise GuestError(
                f"page {page} of RAM block '{self.idstr}' came before it was asked for"
            )

    def _refuse_second(self, pages: Pages | list[int]) -> None:
        assert self.received is not None
        came = self.received[pages]
        if came.any():
            raise self._second(int(pages[int(np.flatnonzero(came)[0])]))
        if len(pages) > 1 and len(set(pages if isinstance(pages, list) else pages.tolist())) != len(
            pages
        ):
            raise self._second(int(pages[0]))

    def _refuse_second_run(self, first: int, count: int) -> None:
        if self._came[first : first + count].tobytes().count(1):
            raise self._second(first)

    def _second(self, page: int) -> GuestError:
        return GuestError(f"page {page} of RAM block '{self.idstr}' or one beside it came twice")

    def _unmap_discarded(self, scanner: WrittenScanner | None) -> None:
        """Let what was discarded be missing where the workload has it before its eyes."""
        assert self._discarded is not None
        pages = np.flatnonzero(self._discarded)
        if scanner is not None:
            begin, size = np.uint64(self.address_there), np.uint64(self.page_size)
            seen = np.zeros(self.page_count, np.bool_)
            for region in scanner.mapped(self.address_there, self.used_length):
                first, end = ((region - begin) // size).tolist()
                seen[first:end] = True
            pages = pages[seen[pages]]
        self._forget(pages)

    def _forget(self, pages: Pages) -> None:
        """Give the memory of discarded pages back, as far as they did not come since."""
        assert self._discarded is not None
        assert self.received is not None
        pages = pages[~self.received[pages]]
        for first, count in page_runs(pages).tolist():
            self.memory.forget(first, count)
        self._discarded[pages] = False

    def _place_one(self, page: int, source: int) -> None:
        there = self.address_there + page * self.page_size
        discarded = self._discarded
        is_new = (discarded is None or not discarded[page]) and copy_page(
            self._userfaultfd, there, source, self.page_size
        )
        if not is_new:
            self.memory.copy_in(page, source)
        self.present[page] = True
        self._came[page] = 1
        if not is_new:
            self._map(page, 1)

    def _place_run(self, first: int, data: Bytes) -> None:
        self.memory.write_run(first, data)
        self.mark_placed(slice(first, first + len(data)))
        self._map(first, len(data))

    def _place_runs(self, pages: Pages, data: Bytes) -> None:
        pages, data = _ascending(pages, data)
        begin = 0
        for first, count in page_runs(pages).tolist():
            if count > 1:
                self._place_run(first, data[begin : begin + count])
            else:
                self._place_one(first, address_of(data[begin]))
            begin += count

    def _zero_run(self, first: int, count: int) -> None:
        assert self.received is not None
        if self._discarded is not None:
            self._forget(np.flatnonzero(self._discarded[first : first + count]) + first)
        self.received[first : first + count] = True
        size = self.page_size
        zero_pages(self._userfaultfd, self.address_there + first * size, count * size)

    def _map(self, first: int, count: int) -> None:
        size = self.page_size
        map_pages(self._userfaultfd, self.address_there + first * size, count * size)


def _ascending(pages: Pages, data: Bytes) -> tuple[Pages, Bytes]:
    """The same pages in order: walks bring them downwards, and where they meet in any order."""
    steps = np.diff(pages)
    if (steps > 0).all():
        return pages, data
    if (steps < 0).all():
        return pages[::-1], data[::-1]
    order = np.argsort(pages)
    return pages[order], data[order]

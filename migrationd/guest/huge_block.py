"""A RAM block of a workload in huge pages: they are shown whole, or not at all.

Target pages come one by one and in any order. They are written through the mapping here,
for such memory takes no ``write``; the workload gets a huge page when its last one is there.

Reference: ``hugetlbfs``; a source sends whole huge pages, stream format 6.4.
"""

import ctypes

import numpy as np

from migrationd.errors import GuestError
from migrationd.guest.memory import Bytes, Pages, SharedMemory
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.linux.iovec import address_of, view_of
from migrationd.linux.page_faults import map_huge_page


class HugeWorkloadBlock(WorkloadBlock):
    """A block that a workload has mapped in huge pages.

    Args:
        spec: Name and size; ``backing_page_size`` is that of the huge pages.
        memory: Its memory, mapped here as well.
        address: Where the workload has mapped it.
    """

    def __init__(self, spec: RamBlockSpec, memory: SharedMemory, address: int) -> None:
        super().__init__(spec, memory, address)
        assert spec.backing_page_size is not None
        self.host_pages = spec.backing_page_size // spec.page_size

    def _tell_placed(self, page: int) -> None:
        # It is waited for until its huge page is whole.
        if self.has_come(page):
            self._on_placed(page - page % self.host_pages)

    def has_come(self, page: int) -> bool:
        """Whether the huge page around it was received, all of it."""
        first = page - page % self.host_pages
        return self._came[first : first + self.host_pages].tobytes().count(1) == self.host_pages

    def discard(self, runs: Pages) -> None:
        """See :class:`WorkloadBlock`; what could not be told apart later is given back at once.

        Raises:
            GuestError: It would leave half of a huge page.
        """
        if (runs % self.host_pages).any():
            raise GuestError(f"RAM block '{self.idstr}': a discard of no whole huge pages")
        self.track_received()
        assert self.received is not None
        for pages in self._indexes(runs):
            self.present[pages] = False
            self.received[pages] = False
        for first, count in runs[runs[:, 1] > 0].tolist():
            self.memory.forget(first, count)

    def show_again(self, page: int, most: int) -> None:
        """See :class:`WorkloadBlock`; its huge page alone is large enough."""
        self._map(page, 1)

    def _place_one(self, page: int, source: int) -> None:
        self._place_run(page, np.frombuffer(view_of(source, self.page_size), np.uint8)[None])

    def _place_run(self, first: int, data: Bytes) -> None:
        self.memory.place_run(first, data)
        self.mark_placed(slice(first, first + len(data)))
        self._map(first, len(data))

    def _zero_run(self, first: int, count: int) -> None:
        assert self.received is not None
        size = self.page_size
        # Also where it is zero already: what nobody has touched cannot be mapped.
        ctypes.memset(address_of(self.memory.view) + first * size, 0, count * size)
        self.received[first : first + count] = True
        self._map(first, count)

    def _map(self, first: int, count: int) -> None:
        """Show the huge pages around these that are whole."""
        size = self.host_pages * self.page_size
        for number in range(first // self.host_pages, -(-(first + count) // self.host_pages)):
            if self.has_come(number * self.host_pages):
                map_huge_page(self._userfaultfd, self.address_there + number * size, size)


def workload_block(spec: RamBlockSpec, memory: SharedMemory, address: int) -> WorkloadBlock:
    """A block of a workload, in whatever pages its memory has."""
    make = HugeWorkloadBlock if spec.backing_page_size is not None else WorkloadBlock
    return make(spec, memory, address)

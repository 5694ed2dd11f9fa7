"""Which pages a workload writes, where the kernel does not note it by itself.

Each first write to a page waits until it was put down here; neighbours that were not
written are taken for written when a guest goes through its memory in order, for one fault
costs as much as many pages.

Reference: synchronous write protection of ``userfaultfd``, Linux 5.19 and later.
"""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.guest.memory import Pages, page_runs
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.guest.write_faults import WriteFaults

AHEAD_PAGES = 32
"""Most pages that one fault lets through."""

_GAP_PAGES = 64
"""Pages between two runs that are protected already, and may be again with them."""


class FaultTracker:
    """See :class:`migrationd.guest.dirty.DirtyTracker`.

    Args:
        faults: The workload's write protection; claimed between start and stop.
        blocks: Its blocks.
    """

    def __init__(self, faults: WriteFaults, blocks: Sequence[WorkloadBlock]) -> None:
        self._faults = faults
        self._blocks = tuple(blocks)
        self._lock = threading.Lock()
        self._is_started = False
        self._written: list[npt.NDArray[np.bool_]] = []
        self._grains: list[int] = []
        self._expected: tuple[int, int] = (-1, -1)
        self._ahead = 1

    def start(self) -> None:
        """See the protocol.

        Raises:
            GuestError: The memory is being watched for something else, or the guest is gone.
        """
        if self._is_started:
            self.collect()
            return
        self._written = [np.zeros(block.page_count, np.bool_) for block in self._blocks]
        self._grains = [block.memory.grain_bytes // block.page_size for block in self._blocks]
        self._faults.claim(self._on_fault)
        self._is_started = True
        for index, block in enumerate(self._blocks):
            self._faults.protect(index, 0, block.page_count)

    def collect(self) -> list[Pages]:
        """See the protocol; what is found is protected again before it is told.

        Raises:
            GuestError: The guest is gone, or was never watched.
        """
        if not self._is_started:
            raise GuestError("the workload's memory is not tracked")
        with self._lock:
            found = [np.flatnonzero(written) for written in self._written]
            for index, pages in enumerate(found):
                self._written[index][:] = False
                for first, count in _joined(page_runs(pages)).tolist():
                    self._faults.protect(index, first, count)
        return found

    def peek(self) -> int:
        """See the protocol."""
        with self._lock:
            return sum(
                int(np.count_nonzero(written)) * block.page_size
                for written, block in zip(self._written, self._blocks, strict=False)
            )

    def stop(self) -> None:
        """See the protocol."""
        if self._is_started:
            self._is_started = False
            self._faults.release()

    def _on_fault(self, index: int, page: int) -> None:
        grain = self._grains[index]
        with self._lock:
            self._ahead = (
                min(2 * self._ahead, AHEAD_PAGES) if (index, page) == self._expected else 1
            )
            first = page // grain * grain
            count = max(grain, self._ahead // grain * grain)
            count = min(count, self._blocks[index].page_count - first)
            self._written[index][first : first + count] = True
            self._expected = index, first + count
            self._faults.allow(index, first, count)


def _joined(runs: Pages) -> Pages:
    """Runs with the short gaps between them."""
    if len(runs) < 2:
        return runs
    ends = runs[:, 0] + runs[:, 1]
    is_far = runs[1:, 0] - ends[:-1] > _GAP_PAGES
    first = runs[np.concatenate(([True], is_far)), 0]
    last = ends[np.concatenate((is_far, [True]))]
    return np.stack((first, last - first), axis=1)

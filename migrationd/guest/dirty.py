"""Which pages of a running guest were written since the last look.

Reference: ``linux/pagemap.py`` and, where the kernel cannot scan, ``fault_tracker.py``;
"start, then collect" corresponds to QEMU's dirty log.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from migrationd.errors import GuestError
from migrationd.guest.memory import Pages, pages_of
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.pagemap import WrittenScanner


class DirtyTracker(Protocol):
    """Tracks writes to all blocks of one guest; used by one thread at a time."""

    def start(self) -> None:
        """Forget what was written so far.

        Raises:
            GuestError: The memory cannot be tracked.
        """

    def collect(self) -> list[Pages]:
        """Pages written since :meth:`start` or the last call, ascending, for each block.

        Raises:
            GuestError: The guest is gone.
        """

    def peek(self) -> int:
        """Bytes of the pages that :meth:`collect` would find now; it still finds them.

        Raises:
            GuestError: The guest is gone.
        """

    def stop(self) -> None:
        """Nobody asks any more, until the next :meth:`start`."""


class PagemapTracker:
    """Asynchronous write protection and PAGEMAP_SCAN on a workload's memory.

    Args:
        pagemap: The workload's ``/proc/self/pagemap``, not owned.
        blocks: Blocks and where the workload has mapped them.
    """

    def __init__(self, pagemap: int, blocks: Sequence[tuple[RamBlock, int]]) -> None:
        self._scanner = WrittenScanner(pagemap)
        self._blocks = tuple(blocks)

    def start(self) -> None:
        """See :class:`DirtyTracker`."""
        for block, address in self._blocks:
            self._scanner.scan(address, block.used_length, protect=True)

    def collect(self) -> list[Pages]:
        """See :class:`DirtyTracker`."""
        found = []
        for block, address in self._blocks:
            regions = self._scanner.scan(address, block.used_length, protect=True)
            runs = ((regions - np.uint64(address)) // np.uint64(block.page_size)).astype(np.int64)
            runs[:, 1] -= runs[:, 0]
            found.append(pages_of(runs))
        return found

    def peek(self) -> int:
        """See :class:`DirtyTracker`."""
        found = 0
        for block, address in self._blocks:
            regions = self._scanner.scan(address, block.used_length, protect=False)
            found += int((regions[:, 1] - regions[:, 0]).sum())
        return found

    def stop(self) -> None:
        """See :class:`DirtyTracker`; a page that stays protected costs its next writer 1 us."""


class NoTracker:
    """For a workload that could not offer its pagemap: it cannot migrate while it runs."""

    def start(self) -> None:
        """See :class:`DirtyTracker`."""
        raise GuestError(
            "the workload's memory cannot be tracked: a permitted userfaultfd is needed, with "
            "Linux 6.7 or later, or 5.19 where it takes the kernel's own faults"
        )

    def collect(self) -> list[Pages]:
        """See :class:`DirtyTracker`."""
        raise GuestError("the workload's memory is not tracked")

    def peek(self) -> int:
        """See :class:`DirtyTracker`."""
        raise GuestError("the workload's memory is not tracked")

    def stop(self) -> None:
        """See :class:`DirtyTracker`."""

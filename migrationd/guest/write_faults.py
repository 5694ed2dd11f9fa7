"""Writes of a workload that wait until they were seen: synchronous write protection.

A page belongs to one userfaultfd at a time. While nothing is looked for here, all blocks are
the workload's own, which lets writes pass and only notes them.

Reference: the descriptors ``faults`` and ``userfaultfd`` of the guest socket.
"""

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from migrationd.errors import GuestError
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.faults import FaultReader
from migrationd.linux.priority import urgent_thread
from migrationd.linux.userfaultfd import MODE_WP, register, unregister, wake, write_protect

_SLICE_BYTES = 32 << 20
"""Changes hands, or is protected, in one call: meanwhile the kernel lets the workload map nothing,
and where it changes hands no page fault pass."""


class WriteFaults:
    """Write protection of one workload's blocks, and a thread that is told of each fault.

    :meth:`protect` and :meth:`allow` may be called by any thread.

    Args:
        faults: Its descriptor ``faults``; not owned.
        userfaultfd: The descriptor that watches it otherwise, or -1; not owned.
        blocks: Blocks and where the workload has mapped them.
    """

    def __init__(
        self, faults: int, userfaultfd: int, blocks: Sequence[tuple[RamBlock, int]]
    ) -> None:
        self._faults = faults
        self._userfaultfd = userfaultfd
        self._blocks = tuple(blocks)
        order = sorted(range(len(blocks)), key=lambda index: blocks[index][1])
        self._order = order
        self._addresses = [blocks[index][1] for index in order]
        self._claim = threading.Lock()
        self._reader: FaultReader | None = None
        self._thread: threading.Thread | None = None
        self._on_fault: Callable[[int, int], None] = lambda _block, _page: None

    def claim(self, on_fault: Callable[[int, int], None]) -> None:
        """Take all blocks over; nothing is protected yet.

        Args:
            on_fault: Told of block index and page of each write that waits; it has to
                :meth:`allow` it. Called on a thread of its own.

        Raises:
            GuestError: Somebody else uses it, or the workload is gone.
        """
        if not self._claim.acquire(blocking=False):
            raise GuestError("the workload's memory is being watched for something else")
        self._on_fault = on_fault
        try:
            self._change_hands(self._userfaultfd, self._faults)
            self._reader = FaultReader(self._faults)
            self._thread = threading.Thread(target=self._serve, name="write faults", daemon=True)
            self._thread.start()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let all writes pass, and give the blocks back; nothing if they were not taken."""
        if not self._claim.locked():
            return
        with contextlib.suppress(GuestError):  # a workload that is gone waits for nothing
            self._change_hands(self._faults, self._userfaultfd)
        if self._reader is not None and self._thread is not None:
            self._reader.end()
            self._thread.join()
            self._reader.close()
        self._reader = self._thread = None
        self._claim.release()

    def protect(self, block: int, first: int, count: int) -> None:
        """Let writes to some pages wait.

        Raises:
            GuestError: The workload is gone.
        """
        self._set(block, first, count, protect=True)

    def allow(self, block: int, first: int, count: int) -> None:
        """Let writes to some pages pass, those too that wait already.

        Raises:
            GuestError: The workload is gone.
        """
        self._set(block, first, count, protect=False)

    def _set(self, index: int, first: int, count: int, *, protect: bool) -> None:
        block, address = self._blocks[index]
        size = block.page_size
        for begin, length in _slices(address + first * size, count * size):
            write_protect(self._faults, begin, length, protect=protect)

    def _change_hands(self, old: int, new: int) -> None:
        for block, address in self._blocks:
            for begin, length in _slices(address, block.used_length):
                if old >= 0:
                    unregister(old, begin, length)  # nothing is protected then
                    wake(old, begin, length)
                if new >= 0:
                    register(new, begin, length, MODE_WP)

    def _serve(self) -> None:
        assert self._reader is not None
        # A workload that is gone waits for nothing.
        with contextlib.suppress(GuestError), urgent_thread():
            while self._reader.wait():
                for address, _ in self._reader.read():
                    index = self._order[bisect.bisect_right(self._addresses, address) - 1]
                    block, begin = self._blocks[index]
                    self._on_fault(index, (address - begin) // block.page_size)


def _slices(address: int, length: int) -> Iterator[tuple[int, int]]:
    """Address and bytes of what one call is for."""
    for begin in range(address, address + length, _SLICE_BYTES):
        yield begin, min(_SLICE_BYTES, address + length - begin)

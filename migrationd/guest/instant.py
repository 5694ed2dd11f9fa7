"""The memory of a running guest as it was at one instant.

    arm      all pages are protected while the guest runs; a write is let through and noted,
             and its page protected again, until few are left that were written
    freeze   the guest stands still: those few are protected again. It may run on
    pieces   every page once: what the guest is about to write is copied first and let through

So the guest stands still for no longer than its devices take, whatever its size; a write
waits for a copy of its page, not for the page to be sent.

Reference: QEMU's ``background-snapshot``, which protects a stopped guest and sends a page
before it lets the write through.
"""

import mmap
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.guest.memory import Bytes, Pages, SharedMemory, page_runs
from migrationd.guest.ram_block import RamBlock
from migrationd.guest.write_faults import WriteFaults

TAKE_BYTES = 1 << 20
"""Copied and let through at once, in order, while the guest writes nothing."""

AHEAD_PAGES = 64
"""Most pages that are copied at one write, of a guest that goes through them in order."""

WAITING_SLABS = 64
"""More copies than these, of ``TAKE_BYTES`` each, do not wait to be sent: the guest does."""

FEW_PAGES = 2048
"""So many pages are protected again in a fraction of a millisecond."""

_ROUNDS = 8
"""A guest that writes faster than its pages are protected is stopped nevertheless."""

_FEW_FAULTS = 32
_MANY_PAGES = 512
"""Let through at a fault after so many of them, before the instant: a guest that has to be
stopped must not wait for each page until it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages of a block as they were.

    Attributes:
        block: Index of the block.
        pages: Page numbers, ascending, shape ``(n,)``.
        rows: Which row of the content each of them has, shape ``(n,)``; consecutive pages have
            consecutive rows.
        content: Shape ``(m, page size)``, or None if all pages are zero.
    """

    block: int
    pages: Pages
    rows: Pages
    content: Bytes | None


class _Slab:
    """Copies of pages of one block, in the order in which they were written to."""

    def __init__(self, block: int, content: Bytes) -> None:
        self.block = block
        self.content = content
        self.pages = np.empty(len(content), np.int64)
        self.used = 0

    def piece(self) -> Piece:
        pages = self.pages[: self.used]
        order = np.argsort(pages)
        ascending = pages[order]
        return Piece(self.block, ascending, np.arange(self.used), self.content[order])


class MemoryAtInstant:
    """Used by one thread; the guest's faults are served by another one.

    Args:
        blocks: The guest's blocks, in memory that is shared with it.
        faults: Its write protection; claimed until :meth:`close`.
    """

    def __init__(self, blocks: Sequence[RamBlock], faults: WriteFaults) -> None:
        self._blocks = tuple(blocks)
        self._faults = faults
        self._changed = threading.Condition()
        self._is_frozen = False
        self._is_closed = False
        self._is_gone = False
        self._memories: list[SharedMemory] = []
        self._grains: list[int] = []
        for block in blocks:
            assert isinstance(block.memory, SharedMemory)
            self._memories.append(block.memory)
            self._grains.append(block.memory.grain_bytes // block.page_size)
        self._written = self._bools()
        self._held = self._bools()
        self._taken = self._bools()
        self._slabs: deque[_Slab] = deque()
        self._next = (0, 0)
        self._expected = (-1, -1)
        self._ahead = 1
        self._early_faults = 0
        most = max(map(self._take_pages, range(len(blocks))), default=1)
        self._bounce = _aligned(most * max((block.page_size for block in blocks), default=1))

    def arm(self) -> None:
        """Protect all pages of the guest, which may run.

        Raises:
            GuestError: It is gone, or its memory is being watched for something else.
        """
        self._faults.claim(self._on_fault)
        for index, block in enumerate(self._blocks):
            self._faults.protect(index, 0, block.page_count)
        # A page that gets memory from now on is written to, or is zero.
        for memory, held in zip(self._memories, self._held, strict=True):
            for first, count in memory.data_runs().tolist():
                held[first : first + count] = True
        last = -1
        for _ in range(_ROUNDS):
            found = self._protect_written()
            if found <= FEW_PAGES or 0 <= last <= found:
                return
            last = found

    def freeze(self) -> None:
        """Make now the instant: the guest stands still until this returns.

        Raises:
            GuestError: It is gone.
        """
        self._protect_written()
        with self._changed:
            self._is_frozen = True

    def pieces(self) -> Iterator[Piece]:
        """Every page once; a content is valid until the next one is asked for."""
        while (piece := self._next_piece()) is not None:
            yield piece

    def close(self) -> None:
        """Let the guest write what it likes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._faults.release()

    def _bools(self) -> list[npt.NDArray[np.bool_]]:
        return [np.zeros(block.page_count, np.bool_) for block in self._blocks]

    def _take_pages(self, index: int) -> int:
        grain = self._grains[index]
        return max(grain, TAKE_BYTES // self._blocks[index].page_size // grain * grain)

    def _protect_written(self) -> int:
        """Protect again what was written; how many pages those were."""
        found = 0
        with self._changed:
            for index, written in enumerate(self._written):
                pages = np.flatnonzero(written)
                found += len(pages)
                self._held[index][pages] = True
                written[pages] = False
                for first, count in page_runs(pages).tolist():
                    self._faults.protect(index, first, count)
        return found

    def _on_fault(self, index: int, page: int) -> None:
        grain = self._grains[index]
        with self._changed:
            if not self._is_frozen:
                self._let_through_early(index, page)
                return
            is_next = (index, page) == self._expected
            self._ahead = min(2 * self._ahead, AHEAD_PAGES) if is_next else 1
            first = page // grain * grain
            end = first + max(grain, self._ahead // grain * grain)
            end = min(end, self._blocks[index].page_count)
            self._expected = index, end
            for at in range(first, end, grain):
                self._keep(index, at, min(at + grain, end))
            self._faults.allow(index, first, end - first)

    def _let_through_early(self, index: int, page: int) -> None:
        """Note a write before the instant, and that its neighbours may be written too."""
        self._early_faults += 1
        count = max(
            self._grains[index], AHEAD_PAGES if self._early_faults <= _FEW_FAULTS else _MANY_PAGES
        )
        first = page // count * count
        end = min(first + count, self._blocks[index].page_count)
        self._written[index][first:end] = True
        self._faults.allow(index, first, end - first)

    def _keep(self, index: int, first: int, end: int) -> None:
        """Copy pages that are about to be written, unless that was done."""
        while (
            not self._taken[index][first]
            and len(self._slabs) >= WAITING_SLABS
            and self._room(index) < end - first
            and not self._is_closed
        ):
            self._changed.wait()
        if self._taken[index][first] or self._is_closed:
            return
        if self._room(index) < end - first:
            size = self._blocks[index].page_size
            rows = np.empty((self._take_pages(index), size), np.uint8)
            self._slabs.append(_Slab(index, rows))
        slab = self._slabs[-1]
        rows = slab.content[slab.used : slab.used + end - first]
        rows[:] = self._pages(index, first, end) if self._held[index][first:end].any() else 0
        slab.pages[slab.used : slab.used + end - first] = np.arange(first, end)
        slab.used += end - first
        self._taken[index][first:end] = True

    def _room(self, index: int) -> int:
        """Pages that the last slab can still take of a block."""
        slab = self._slabs[-1] if self._slabs else None
        return len(slab.content) - slab.used if slab is not None and slab.block == index else 0

    def _next_piece(self) -> Piece | None:
        """Copies that wait, or the next pages in order that nobody took; None at the end."""
        with self._changed:
            if self._slabs:
                slab = self._slabs.popleft()
                self._changed.notify_all()
            else:
                return self._take()
        return slab.piece()

    def _take(self) -> Piece | None:
        index, first = self._next
        while index < len(self._blocks):
            taken = self._taken[index]
            end = min(first + self._take_pages(index), len(taken))
            free = np.flatnonzero(~taken[first:end])
            if len(free):
                break
            index, first = (index, end) if end < len(taken) else (index + 1, 0)
        else:
            return None
        size = self._blocks[index].page_size
        content = None
        if self._held[index][first:end].any():
            # A look at what was never touched would give it memory.
            content = self._bounce[: (end - first) * size].reshape(-1, size)
            held = self._held[index][first:end]
            if held.all():
                content[:] = self._pages(index, first, end)
            else:
                content[held] = self._pages(index, first, end)[held]
                content[~held] = 0
        taken[first:end] = True
        self._next = index, end
        self._let_through(index, first, end - first)
        return Piece(index, free + first, free, content)

    def _pages(self, index: int, first: int, end: int) -> Bytes:
        size = self._blocks[index].page_size
        return self._memories[index].view[first * size : end * size].reshape(-1, size)

    def _let_through(self, index: int, first: int, count: int) -> None:
        """Allow writes; a workload that has died since the instant needs no leave."""
        if self._is_gone:
            return
        try:
            self._faults.allow(index, first, count)
        except GuestError:
            self._is_gone = True


def _aligned(size: int) -> Bytes:
    """Zeroed memory that begins at a page, for direct I/O."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)

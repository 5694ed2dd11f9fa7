"""The memory of a running guest as it was at one instant.

    arm      all pages are protected while the guest runs; a write is let through and noted,
             and its page protected again, until few are left that were written
    freeze   the guest stands still: those few are protected again. It may run on
    pieces   every page once: what the guest is about to write is copied first and let through,
             with its neighbours: a fault costs as much as the copy of many pages

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
"""Pages that are copied at one write, while there is room for them to wait."""

WAITING_SLABS = 64
"""More copies than these, of ``TAKE_BYTES`` each, do not wait to be sent: the guest does."""

FEW_PAGES = 2048
"""So many pages are protected again in a fraction of a millisecond."""

_ROUNDS = 8
"""A guest that writes faster than its pages are protected is stopped nevertheless."""

_FEW_FAULTS = 32
_MANY_PAGES = 128
"""Let through at a fault after so many of them, before the instant: a guest that has to be
stopped must not wait for each page until it is. Those of its last writes are protected again while
it stands still, 100 ns each."""


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

    def __init__(self, block: int, content: Bytes, pages: int, page_size: int) -> None:
        self.block = block
        self.memory = content
        self.content = content[: pages * page_size].reshape(pages, page_size)
        self.pages = np.empty(pages, np.int64)
        self.used = 0

    def piece(self, content: Bytes) -> Piece:
        """In the order of the pages, put into this memory."""
        pages = self.pages[: self.used]
        order = np.argsort(pages)
        content = content[: self.used * self.content.shape[1]].reshape(self.used, -1)
        np.take(self.content, order, axis=0, out=content, mode="clip")
        return Piece(self.block, pages[order], np.arange(self.used), content)


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
        self._taking = (-1, 0, 0)
        self._early_faults = 0
        self._is_written_to = False
        most = max(map(self._take_pages, range(len(blocks))), default=1)
        self._slab_bytes = most * max((block.page_size for block in blocks), default=1)
        self._bounce = _aligned(self._slab_bytes)
        self._spare: list[Bytes] = []

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
            has_room = len(self._slabs) <= WAITING_SLABS // 2
            count = max(grain, min(AHEAD_PAGES, self._take_pages(index)) if has_room else 1)
            first = page // count * count
            end = min(first + count, self._blocks[index].page_count)
            while not (is_taking := self._is_taking(index, page)) and self._must_wait(
                index, first, end
            ):
                self._changed.wait()
            self._is_written_to = True
            if is_taking:
                return  # the other thread copies it, and lets it through then
            self._keep(index, first, end)
            self._faults.allow(index, first, end - first)

    def _is_taking(self, index: int, page: int) -> bool:
        """Whether a page is just being copied in its turn.

        Its neighbours are as well then, or none of them: a turn is of whole neighbourhoods.
        """
        block, first, end = self._taking
        return index == block and first <= page < end

    def _must_wait(self, index: int, first: int, end: int) -> bool:
        """Whether there is no room for copies of pages, of which some are needed."""
        return (
            not self._is_closed
            and len(self._slabs) >= WAITING_SLABS
            and self._room(index) < end - first
            and not self._taken[index][first:end].all()
        )

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
        """Copy pages that are about to be written, as far as that was not done."""
        taken = self._taken[index][first:end]
        if self._is_closed or not (count := int(np.count_nonzero(~taken))):
            return
        if self._room(index) < count:
            memory = self._spare.pop() if self._spare else _aligned(self._slab_bytes)
            size = self._blocks[index].page_size
            self._slabs.append(_Slab(index, memory, self._take_pages(index), size))
        slab = self._slabs[-1]
        rows = slab.content[slab.used : slab.used + count]
        self._copy(index, first, end, rows, ~taken)
        slab.pages[slab.used : slab.used + count] = np.flatnonzero(~taken) + first
        slab.used += count
        taken[:] = True

    def _copy(
        self, index: int, first: int, end: int, rows: Bytes, is_wanted: npt.NDArray[np.bool_]
    ) -> None:
        """Copy wanted pages; a look at what was never touched would give it memory."""
        held = self._held[index][first:end]
        if held.all() and is_wanted.all():
            rows[:] = self._pages(index, first, end)
            return
        held = held[is_wanted]
        if held.any():
            rows[held] = self._pages(index, first, end)[np.flatnonzero(is_wanted)[held]]
        rows[~held] = 0

    def _room(self, index: int) -> int:
        """Pages that the last slab can still take of a block."""
        slab = self._slabs[-1] if self._slabs else None
        return len(slab.content) - slab.used if slab is not None and slab.block == index else 0

    def _next_piece(self) -> Piece | None:
        """Copies that wait, or the next pages in order that nobody took; None at the end."""
        with self._changed:
            slab = self._slabs.popleft() if self._slabs else None
            found = self._next_pages() if slab is None else None
            self._changed.notify_all()
        if slab is not None:
            piece = slab.piece(self._bounce)
            self._spare.append(slab.memory)
            return piece
        return None if found is None else self._take(*found)

    def _next_pages(self) -> tuple[int, int, int, Pages] | None:
        """The next range of which nobody took all, and what is to be taken; it is from now on."""
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
        taken[first:end] = True
        self._next = index, end
        self._taking = index, first, end
        return index, first, end, free

    def _take(self, index: int, first: int, end: int, free: Pages) -> Piece:
        """Copy a range, which the guest cannot write meanwhile; other writes go on."""
        content = None
        if self._held[index][first:end].any():
            size = self._blocks[index].page_size
            content = self._bounce[: (end - first) * size].reshape(-1, size)
            self._copy(index, first, end, content, np.ones(end - first, np.bool_))
        with self._changed:
            self._taking = (-1, 0, 0)
            is_written_to, self._is_written_to = self._is_written_to, False
        # One that writes nothing is spared the time: all is allowed at once in the end.
        if is_written_to:
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

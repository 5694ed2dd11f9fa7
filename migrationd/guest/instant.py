"""The memory of a running guest as it was at one instant.

    arm      all pages are protected while the guest runs; a write is let through and noted
    freeze   the guest stands still: what was written since is protected again. It may run on
    pieces   every page once: what the guest is about to write is copied first and let through

So the guest stands still for no longer than its devices take, whatever its size; a write
waits for a copy of ``PIECE_BYTES``, not for the pages to be sent.

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
from migrationd.guest.memory import Bytes, SharedMemory
from migrationd.guest.ram_block import RamBlock
from migrationd.guest.write_faults import WriteFaults

PIECE_BYTES = 256 << 10
"""Copied and let through at a write: neighbours are likely to be written next."""

TAKE_BYTES = 1 << 20
"""Copied and let through at once, in order, while the guest writes nothing."""

COPIES_BYTES = 64 << 20
"""More copies than this do not wait to be sent: the guest does."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive pages of a block as they were.

    Attributes:
        block: Index of the block.
        first: First page.
        count: Pages.
        content: Shape ``(count, page size)``, or None if all of them are zero.
        is_copy: Whether the content has memory of its own.
    """

    block: int
    first: int
    count: int
    content: Bytes | None
    is_copy: bool = False


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
        self._piece_pages: list[int] = []
        for block in blocks:
            assert isinstance(block.memory, SharedMemory)
            self._memories.append(block.memory)
            self._piece_pages.append(max(PIECE_BYTES, block.memory.grain_bytes) // block.page_size)
        self._taken: list[npt.NDArray[np.bool_]] = [
            np.zeros(-(-block.page_count // pages), np.bool_)
            for block, pages in zip(self._blocks, self._piece_pages, strict=True)
        ]
        self._written: set[tuple[int, int]] = set()
        self._copies: deque[Piece] = deque()
        self._copied_bytes = 0
        self._spare: list[Bytes] = []
        self._next = (0, 0)
        self._bounce = _aligned(
            max(
                (pages * block.page_size for block, pages in self._sizes()),
                default=0,
            )
        )

    def arm(self) -> None:
        """Protect all pages of the guest, which may run.

        Raises:
            GuestError: It is gone, or its memory is being watched for something else.
        """
        self._faults.claim(self._on_fault)
        for index, block in enumerate(self._blocks):
            self._faults.protect(index, 0, block.page_count)

    def freeze(self) -> None:
        """Make now the instant: the guest stands still until this returns.

        Raises:
            GuestError: It is gone.
        """
        with self._changed:
            for index, piece in self._written:
                self._faults.protect(index, *self._extent(index, piece))
            self._is_frozen = True

    def pieces(self) -> Iterator[Piece]:
        """Every page once; a content is valid until the next one is asked for."""
        while (piece := self._next_piece()) is not None:
            yield piece
            if piece.is_copy and piece.content is not None:
                with self._changed:
                    self._spare.append(piece.content)

    def close(self) -> None:
        """Let the guest write what it likes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._faults.release()

    def _sizes(self) -> Iterator[tuple[RamBlock, int]]:
        for block, pages in zip(self._blocks, self._piece_pages, strict=True):
            yield block, max(pages, TAKE_BYTES // block.page_size // pages * pages)

    def _extent(self, index: int, piece: int, pieces: int = 1) -> tuple[int, int]:
        """First page and count of consecutive pieces."""
        pages = self._piece_pages[index]
        first = piece * pages
        return first, min(pages * pieces, self._blocks[index].page_count - first)

    def _on_fault(self, index: int, page: int) -> None:
        piece = page // self._piece_pages[index]
        first, count = self._extent(index, piece)
        with self._changed:
            if not self._is_frozen:
                self._written.add((index, piece))
                self._faults.allow(index, first, count)
                return
            while (
                self._copied_bytes >= COPIES_BYTES
                and not self._taken[index][piece]
                and not self._is_closed
            ):
                self._changed.wait()
            if not (self._taken[index][piece] or self._is_closed):
                size = self._blocks[index].page_size
                into = self._buffer(count, size)
                content = self._copy(index, first, into)
                if content is None:
                    self._spare.append(into)
                self._copies.append(Piece(index, first, count, content, is_copy=True))
                self._copied_bytes += count * size
                self._taken[index][piece] = True
            self._faults.allow(index, first, count)

    def _next_piece(self) -> Piece | None:
        """A copy that waits, or the next pages in order that nobody took; None at the end."""
        with self._changed:
            if self._copies:
                piece = self._copies.popleft()
                self._copied_bytes -= piece.count * self._blocks[piece.block].page_size
                self._changed.notify_all()
                return piece
            return self._take()

    def _take(self) -> Piece | None:
        index, piece = self._next
        while index < len(self._blocks):
            taken = self._taken[index]
            free = np.flatnonzero(~taken[piece:])
            if len(free):
                break
            index, piece = index + 1, 0
        else:
            return None
        piece += int(free[0])
        most = self._bounce.size // (self._piece_pages[index] * self._blocks[index].page_size)
        others = np.flatnonzero(taken[piece : piece + most])
        pieces = int(others[0]) if len(others) else min(most, len(taken) - piece)
        first, count = self._extent(index, piece, pieces)
        size = self._blocks[index].page_size
        content = self._copy(index, first, self._bounce[: count * size].reshape(-1, size))
        taken[piece : piece + pieces] = True
        self._next = index, piece + pieces
        self._let_through(index, first, count)
        return Piece(index, first, count, content)

    def _let_through(self, index: int, first: int, count: int) -> None:
        """Allow writes; a workload that has died since the instant needs no leave."""
        if self._is_gone:
            return
        try:
            self._faults.allow(index, first, count)
        except GuestError:
            self._is_gone = True

    def _copy(self, index: int, first: int, into: Bytes) -> Bytes | None:
        """Copy pages; a look at what was never touched would give it memory."""
        runs = self._memories[index].data_runs(first, len(into))
        if not len(runs):
            return None
        pages = self._memories[index].view.reshape(-1, into.shape[1])
        if int(runs[:, 1].sum()) < len(into):
            into[:] = 0
        for start, count in runs.tolist():
            into[start - first : start - first + count] = pages[start : start + count]
        return into

    def _buffer(self, count: int, page_size: int) -> Bytes:
        for at, spare in enumerate(self._spare):
            if spare.shape == (count, page_size):
                return self._spare.pop(at)
        return _aligned(count * page_size).reshape(count, page_size)


def _aligned(size: int) -> Bytes:
    """Zeroed memory that begins at a page, for direct I/O."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)

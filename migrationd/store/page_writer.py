"""Pages of blocks into the pages areas of a mapped-ram file.

Work is runs of pages, never pages. A gap of zero pages shorter than ``GAP_BYTES`` is written
with the run that it interrupts: its content does not count, for the bitmap says zero. Long
runs bypass the page cache where the file system can (the file is synced before anyone relies
on it, so a cache would only be another copy); short ones go through it. Pages that are in a
file already are shared with it (reflink) where the file system can.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.errors import StoreError
from migrationd.linux.clone import can_offload, clone_range, copy_range
from migrationd.linux.iovec import address_of
from migrationd.store.mapped_ram import PlacedBlock, write_at

GAP_BYTES = 64 << 10
"""Shorter gaps between runs are not worth a hole."""

DIRECT_BYTES = 128 << 10
"""Shorter runs go through the page cache: a direct write waits for the disk."""

CHUNK_BYTES = 4 << 20
"""Bytes of one write."""

DIRECT_ALIGNMENT = 4096

Bytes = npt.NDArray[np.uint8]
Pages = npt.NDArray[np.int64]
Chunk = tuple["PageSource", PlacedBlock, int, int]
"""Source, its places, first page, pages."""


@dataclass(frozen=True, slots=True)
class PageSource:
    """One block that is written.

    Attributes:
        view: Its memory, one dimension.
        present: One bool per page; others are zero pages, whatever their memory holds.
        page_size: Bytes of a page.
        file: Descriptor of the file that the memory is a mapping of, or None.
        position: Where the block begins in it.
    """

    view: Bytes
    present: npt.NDArray[np.bool_]
    page_size: int
    file: int | None = None
    position: int = 0


class PageWriter:
    """Writes the pages of all blocks of one file.

    Args:
        fd: File, open for writing; stays the caller's.
        sources: Blocks in the order of the layout.
        places: Where their pages go.
        writers: Threads that write.
        direct_io: Bypass the page cache for every page that allows it, and fail where the
            file system cannot; otherwise it is used where it helps.
        chunk_bytes: Asked before each write: its most bytes; may wait, and raises to end it.
        on_written: Told of bytes and pages written; called by several threads.

    Raises:
        StoreError: Direct I/O is wanted, and the file system has none.
    """

    def __init__(
        self,
        fd: int,
        sources: Sequence[PageSource],
        places: Sequence[PlacedBlock],
        *,
        writers: int = 1,
        direct_io: bool = False,
        chunk_bytes: Callable[[], int] = lambda: CHUNK_BYTES,
        on_written: Callable[[int, int], None] = lambda _bytes, _pages: None,
    ) -> None:
        self._fd = fd
        self._blocks = tuple(zip(sources, places, strict=True))
        self._writers = writers
        self._chunk_bytes = chunk_bytes
        self._on_written = on_written
        self._lock = threading.Lock()
        self._needs_direct = direct_io
        self._direct_fd = self._open_direct()

    def write(self) -> None:
        """Write every page that is not zero.

        Raises:
            OSError: The file takes nothing more.
            Exception: What ``chunk_bytes`` raised.
        """
        chunks = self._chunks()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not failures:
                    with self._lock:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    self._write_chunk(*chunk)
            except BaseException as error:
                failures.append(error)

        others = [
            threading.Thread(target=work, name=f"page writer {number}", daemon=True)
            for number in range(1, self._writers)
        ]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
        if failures:
            raise failures[0]

    def write_runs(self, place: PlacedBlock, runs: Pages, rows: Pages, content: Bytes) -> None:
        """Write runs of pages, whose contents are elsewhere than in their block.

        Args:
            place: Where the block's pages go.
            runs: First page and count of each, shape ``(n, 2)``.
            rows: Row of the content that each run begins with, shape ``(n,)``.
            content: Shape ``(m, page size)``.

        Raises:
            OSError: As :meth:`write`.
            Exception: What ``chunk_bytes`` raised.
        """
        size = content.shape[1]
        for (first, count), row in zip(runs.tolist(), rows.tolist(), strict=True):
            done = 0
            while done < count:
                step = max(1, min(count - done, self._chunk_bytes() // size))
                data = content[row + done : row + done + step].reshape(-1)
                self._write_content(data, place.pages_position + (first + done) * size)
                self._on_written(len(data), step)
                done += step

    def close(self) -> None:
        """Release what was opened here."""
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None

    def _open_direct(self) -> int | None:
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT
        try:
            return os.open(f"/proc/self/fd/{self._fd}", flags)
        except OSError as error:
            if self._needs_direct:
                raise StoreError(
                    f"the file cannot be written by direct-io: {error.strerror}; turn it off"
                ) from error
            return None

    def _chunks(self) -> Iterator[Chunk]:
        """What is to be written, in the order of the file."""
        for source, place in self._blocks:
            if self._share(source, place):
                continue
            for first, count in runs_to_write(source.present, source.page_size).tolist():
                done = 0
                while done < count:
                    step = max(1, min(count - done, self._chunk_bytes() // source.page_size))
                    yield source, place, first + done, step
                    done += step

    def _share(self, source: PageSource, place: PlacedBlock) -> bool:
        """Let the new file share the pages of the block's file, if both allow it."""
        if source.file is None:
            return False
        length = len(source.view)
        whole = length // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        start, position = source.position, place.pages_position
        if whole and clone_range(source.file, start, self._fd, position, whole):
            if whole < length:
                write_at(self._fd, source.view[whole:].data, position + whole)
        elif can_offload(source.file, self._fd):
            size = source.page_size
            for first, count in (runs_to_write(source.present, size) * size).tolist():
                copy_range(source.file, start + first, self._fd, position + first, count)
        else:
            return False
        pages = int(np.count_nonzero(source.present))
        self._on_written(pages * source.page_size, pages)
        return True

    def _write_chunk(self, source: PageSource, place: PlacedBlock, first: int, count: int) -> None:
        start, end = first * source.page_size, (first + count) * source.page_size
        content = source.view[start:end]
        position = place.pages_position + start
        pages = int(np.count_nonzero(source.present[first : first + count]))
        self._write_content(content, position)
        self._on_written(len(content), pages)

    def _write_content(self, content: Bytes, position: int) -> None:
        if self._may_bypass(content, position):
            self._write_direct(content, position)
        else:
            write_at(self._fd, content.data, position)

    def _may_bypass(self, content: Bytes, position: int) -> bool:
        if self._direct_fd is None or (len(content) < DIRECT_BYTES and not self._needs_direct):
            return False
        return not (address_of(content) | position) % DIRECT_ALIGNMENT

    def _write_direct(self, content: Bytes, position: int) -> None:
        whole = len(content) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        assert self._direct_fd is not None
        try:
            write_at(self._direct_fd, content[:whole].data, position)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A disk with larger blocks: the page cache takes any.
            write_at(self._fd, content[:whole].data, position)
        if whole < len(content):
            write_at(self._fd, content[whole:].data, position + whole)


def runs_to_write(present: npt.NDArray[np.bool_], page_size: int) -> Pages:
    """Runs of present pages, with the short gaps between them.

    Args:
        present: One bool per page, shape ``(n,)``.
        page_size: Bytes of a page.

    Returns:
        First page and count of each run, shape ``(m, 2)``.
    """
    edges = np.flatnonzero(np.diff(present.view(np.int8), prepend=0, append=0))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return np.empty((0, 2), np.int64)
    is_far = (begins[1:] - ends[:-1]) * page_size >= GAP_BYTES
    first = begins[np.concatenate(([True], is_far))]
    last = ends[np.concatenate((is_far, [True]))]
    return np.stack((first, last - first), axis=1)

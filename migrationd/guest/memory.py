"""Where the pages of one RAM block live.

Pages are placed from the receive buffer, a strided array, by one NumPy copy or one
gather write; nothing is done for a zero page that was never anything else.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.linux.iovec import pwrite_rows, view_of
from migrationd.linux.sparse import punch_hole

HUGE_PAGE_BYTES = 2 << 20
TRIM_BYTES = 64 << 10
"""Shorter runs of zero pages are not worth a system call to give back."""

_MAP_NORESERVE = 0x4000
_BLOCK_BYTES = 512
"""Of ``st_blocks``."""

Bytes = npt.NDArray[np.uint8]
Pages = npt.NDArray[np.int64]


class Memory(Protocol):
    """Memory of one block.

    Attributes:
        view: The whole block, one dimension, readable; zero where nothing was placed.
    """

    view: Bytes

    def place_run(self, first_page: int, data: Bytes) -> None:
        """Place consecutive pages; ``data`` has shape ``(n, page size)``, maybe strided."""

    def place_pages(self, pages: Pages, data: Bytes) -> None:
        """Place pages; of a page that is named twice the last content stays."""

    def place_scattered(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """Place different pages whose contents lie at these indices of a buffer."""

    def read(self, pages: Pages) -> Bytes:
        """A copy of pages, shape ``(n, page size)``, that nothing outside can end this process by.

        Raises:
            GuestError: Somebody took them away.
        """

    def zero_pages(self, pages: Pages) -> None:
        """Make pages zero again that held something."""

    def give_back(self, runs: Pages) -> None:
        """Release the memory of runs of zero pages, shape ``(n, 2)``: first page, count."""

    def prefetch(self, runs: Pages) -> None:
        """Bring runs of pages into memory soon, without waiting; shape as :meth:`give_back`."""

    def is_at_hand(self, pages: Pages) -> bool:
        """Whether these pages can be read without waiting for a disk."""

    def close(self) -> None:
        """Release everything."""


class MappedMemory:
    """Memory that is mapped here for reading and writing.

    Args:
        mapping: At least ``size`` bytes.
        size: Bytes, a multiple of the page size.
        page_size: Target page size in bytes.
        begin: Where in the mapping the memory begins, at a host page.
    """

    def __init__(self, mapping: mmap.mmap, size: int, page_size: int, begin: int = 0) -> None:
        self._page_size = page_size
        self._map = mapping
        self._begin = begin
        self.view: Bytes = np.frombuffer(mapping, np.uint8, size, begin)
        self._pages = self.view.reshape(-1, page_size)

    def place_run(self, first_page: int, data: Bytes) -> None:
        """Place consecutive pages by one strided copy."""
        self._pages[first_page : first_page + len(data)] = data

    def place_pages(self, pages: Pages, data: Bytes) -> None:
        """Place pages by one indexed copy."""
        self._pages[pages] = data

    def place_scattered(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """Place pages one by one: for short, mixed rows a NumPy call costs more."""
        size = self._page_size
        target = self.view.data
        source = memoryview(buffer)
        for page, at in zip(pages, content_at, strict=True):
            target[page * size : (page + 1) * size] = source[at : at + size]

    def read(self, pages: Pages) -> Bytes:
        """A copy of pages: this memory nobody can take away."""
        return self._pages[pages]

    def zero_pages(self, pages: Pages) -> None:
        """Fill pages with zero."""
        self._pages[pages] = 0

    def give_back(self, runs: Pages) -> None:
        """Nothing, unless the kind of memory knows how."""

    def prefetch(self, runs: Pages) -> None:
        """Nothing: it is memory."""

    def is_at_hand(self, pages: Pages) -> bool:
        """It is memory."""
        return True

    def close(self) -> None:
        """Unmap; a view that is still in use keeps the mapping until it goes."""
        del self.view, self._pages
        with contextlib.suppress(BufferError):
            self._map.close()


def map_anonymous(size: int) -> mmap.mmap:
    """Private memory that costs nothing yet, in huge pages where it is large enough.

    Args:
        size: Bytes.

    Raises:
        GuestError: The kernel gives no address space for it.
    """
    try:
        mapping = mmap.mmap(
            -1,
            max(size, mmap.PAGESIZE),
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
        )
    except (OSError, OverflowError, ValueError) as error:
        raise GuestError(f"cannot map {size} bytes of guest memory: {error}") from error
    if size >= HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class AnonymousMemory(MappedMemory):
    """Private memory, in huge pages where the block is large enough.

    Args:
        size: Bytes, a multiple of the page size.
        page_size: Target page size in bytes.

    Raises:
        GuestError: The kernel gives no address space for it.
    """

    def __init__(self, size: int, page_size: int) -> None:
        super().__init__(map_anonymous(size), size, page_size)
        self._is_huge = size >= HUGE_PAGE_BYTES

    def give_back(self, runs: Pages) -> None:
        """Give long runs back to the kernel; they read as zero."""
        gave_back = False
        for first, count in runs[runs[:, 1] * self._page_size >= TRIM_BYTES].tolist():
            start = -(-first * self._page_size // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + count) * self._page_size // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, self._begin + start, end - start)
                gave_back = True
        if gave_back and self._is_huge:
            # Or the kernel would make whole huge pages of the rest again, holes filled.
            with contextlib.suppress(OSError):
                length = -(-len(self.view) // mmap.PAGESIZE) * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_NOHUGEPAGE, self._begin, length)


def seal_size(fd: int) -> None:
    """Make sure that a memfd never shrinks: a look at what is gone would end this process.

    Raises:
        OSError: It cannot be made sure.
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def memory_page_bytes(fd: int) -> int:
    """Bytes of the pages that a memfd is made of: those of huge ones, if it is so.

    Raises:
        OSError: It is none.
    """
    return os.fstatvfs(fd).f_bsize


def data_runs(fd: int, size: int, page_size: int) -> Pages:
    """Runs of pages of a memfd that were ever touched, shape ``(n, 2)``: first page, count.

    Raises:
        GuestError: It does not say.
    """
    runs: list[tuple[int, int]] = []
    at = 0
    if _is_whole(fd, size):
        runs, at = [(0, size // page_size)], size
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            at = min(size, os.lseek(fd, begin, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise GuestError(f"a memfd's holes: {error.strerror}") from error
        if begin < at:
            first = begin // page_size
            runs.append((first, -(-at // page_size) - first))
    return np.array(runs, np.int64).reshape(-1, 2)


def _is_whole(fd: int, size: int) -> bool:
    """Whether a memfd has no holes; a look for one keeps a processor for 10 ms per GiB."""
    found = os.fstat(fd)
    return found.st_size == size and found.st_blocks * _BLOCK_BYTES >= size


class SharedMemory(MappedMemory):
    """A memfd that a workload has mapped as well.

    Args:
        fd: The memfd, sealed against shrinking; not owned.
        size: Bytes of the block, a multiple of the page size.
        page_size: Target page size in bytes.

    Raises:
        GuestError: It can shrink under the mapping, or cannot be mapped.
    """

    def __init__(self, fd: int, size: int, page_size: int) -> None:
        self._fd = fd
        try:
            seal_size(fd)
            mapping = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            raise GuestError(
                f"a memfd of {size} bytes that cannot be sealed and mapped: {error}"
            ) from error
        super().__init__(mapping, size, page_size)
        # Memory in huge pages takes no write.
        self._takes_writes = self.grain_bytes == max(page_size, mmap.PAGESIZE)

    def place_run(self, first_page: int, data: Bytes) -> None:
        """Place consecutive pages; raises as :meth:`write_run`."""
        if self._takes_writes:
            self.write_run(first_page, data)
        else:
            super().place_run(first_page, data)

    def clear(self) -> None:
        """Make everything zero, and give its memory back.

        Raises:
            GuestError: The memfd does not let it.
        """
        try:
            punch_hole(self._fd, 0, len(self.view))
        except OSError as error:
            raise GuestError(f"clearing a memfd: {error.strerror}") from error

    @property
    def grain_bytes(self) -> int:
        """Bytes that the kernel protects and gives back at once: of a huge page, if it is so."""
        return max(self._page_size, memory_page_bytes(self._fd))

    def forget(self, first_page: int, count: int) -> None:
        """Make pages zero and give their memory back: nobody has them mapped then.

        Raises:
            GuestError: The memfd does not let it.
        """
        try:
            punch_hole(self._fd, first_page * self._page_size, count * self._page_size)
        except OSError as error:
            raise GuestError(f"clearing a memfd: {error.strerror}") from error

    def write_run(self, first_page: int, data: Bytes) -> None:
        """Write consecutive pages without touching the mapping here: fresh pages come cheaper.

        Raises:
            GuestError: There is no memory.
        """
        try:
            pwrite_rows(self._fd, data, first_page * self._page_size)
        except OSError as error:
            raise GuestError(f"writing a memfd: {error.strerror}") from error

    def copy_in(self, page: int, source: int) -> None:
        """Write one page from an address in this process; raises as :meth:`write_run`."""
        rows = np.frombuffer(view_of(source, self._page_size), np.uint8).reshape(1, -1)
        self.write_run(page, rows)

    def data_runs(self) -> Pages:
        """Runs of pages that may hold something, shape ``(n, 2)``: first page, count.

        What was never touched is left out without touching it.
        """
        return data_runs(self._fd, len(self.view), self._page_size)


class FileMemory:
    """Pages in a file, at their place in a mapped-ram file's pages area.

    Writes go by ``pwritev`` straight from the receive buffer; reads come from a shared
    mapping of the same page cache. A page that is zero again becomes a hole.

    Args:
        fd: File, open for reading and, unless it is only read, writing; duplicated, not owned.
        position: Where the pages area begins.
        size: Bytes of the block; the area must lie within the file.
        page_size: Target page size in bytes.

    Attributes:
        position: Where the pages area begins.

    Raises:
        GuestError: The area cannot be mapped.
    """

    def __init__(self, fd: int, position: int, size: int, page_size: int) -> None:
        self._fd = -1
        self.position = position
        self._page_size = page_size
        self._map: mmap.mmap | None = None
        self.view: Bytes = np.empty(0, np.uint8)
        if not size:
            return
        # A mapping begins at a host page; the pages area at any target page.
        skipped = position % mmap.ALLOCATIONGRANULARITY
        try:
            if position + size > os.fstat(fd).st_size:
                raise ValueError(f"the file ends before byte {position + size}")
            self._fd = os.dup(fd)
            self._map = mmap.mmap(
                fd,
                skipped + size,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=position - skipped,
            )
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise GuestError(f"cannot map {size} bytes of the guest's file: {error}") from error
        self.view = np.frombuffer(self._map, np.uint8, size, skipped)

    def place_run(self, first_page: int, data: Bytes) -> None:
        """Write consecutive pages by gather writes."""
        try:
            pwrite_rows(self._fd, data, self.position + first_page * self._page_size)
        except OSError as error:
            raise _write_error(error) from error

    def place_pages(self, pages: Pages, data: Bytes) -> None:
        """Write pages, each run of consecutive ones by one call."""
        ends = np.flatnonzero(np.diff(pages) != 1) + 1
        begins = (0, *ends.tolist())
        for begin, end in zip(begins, (*begins[1:], len(pages)), strict=True):
            first = int(pages[begin])
            if end - begin > 1:
                self.place_run(first, data[begin:end])
            else:
                self._place_one(first, data[begin].data)

    def place_scattered(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """Write pages one by one."""
        source = memoryview(buffer)
        for page, at in zip(pages, content_at, strict=True):
            self._place_one(page, source[at : at + self._page_size])

    def read(self, pages: Pages) -> Bytes:
        """A copy of pages by ``preadv``: the file may be cut short while it is mapped."""
        rows = np.empty((len(pages), self._page_size), np.uint8)
        at = 0
        for first, count in page_runs(pages).tolist():
            into = rows[at : at + count].reshape(-1).data
            position = self.position + first * self._page_size
            if not read_whole(self._fd, into, position, "the guest's file"):
                raise GuestError("the guest's file was cut short while it was read")
            at += count
        return rows

    def zero_pages(self, pages: Pages) -> None:
        """Make holes of pages, one for each run."""
        size = self._page_size
        try:
            for first, count in page_runs(distinct(pages)).tolist():
                punch_hole(self._fd, self.position + first * size, count * size)
        except OSError as error:
            raise _write_error(error) from error

    def give_back(self, runs: Pages) -> None:
        """Nothing: what is zero is a hole already."""

    def prefetch(self, runs: Pages) -> None:
        """Begin to read runs of pages from the disk, in the order given."""
        for first, count in (runs * self._page_size).tolist():
            with contextlib.suppress(OSError):  # it is advice
                # Not madvise: that would hold the interpreter while the disk is asked.
                os.posix_fadvise(self._fd, self.position + first, count, os.POSIX_FADV_WILLNEED)

    def is_at_hand(self, pages: Pages) -> bool:
        """Whether these pages are in the page cache."""
        scratch = bytearray(1)
        try:
            for start in (self.position + pages * self._page_size).tolist():
                os.preadv(self._fd, (scratch,), start, os.RWF_NOWAIT)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Unmap; the file stays."""
        self.view = np.empty(0, np.uint8)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()

    def _place_one(self, page: int, content: memoryview) -> None:
        position = self.position + page * self._page_size
        try:
            while content:
                done = os.pwrite(self._fd, content, position)
                content = content[done:]
                position += done
        except OSError as error:
            raise _write_error(error) from error


def page_runs(pages: Pages) -> Pages:
    """Runs in ascending, different page numbers, shape ``(n, 2)``: first page, count."""
    if not len(pages):
        return np.empty((0, 2), np.int64)
    begins = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    counts = np.diff(np.append(begins, len(pages)))
    return np.stack((pages[begins], counts), axis=1)


def pages_of(runs: Pages) -> Pages:
    """Page numbers of runs, shape ``(n, 2)``: first page, count."""
    counts = runs[:, 1]
    offsets = np.repeat(np.cumsum(counts) - counts, counts)
    pages: Pages = np.repeat(runs[:, 0], counts) + np.arange(len(offsets)) - offsets
    return pages


def united(one: Pages, other: Pages) -> Pages:
    """All pages of two ascending lists, ascending, each once."""
    if not len(one) or not len(other):
        return other if not len(one) else one
    return distinct(np.concatenate((one, other)))


def distinct(pages: Pages) -> Pages:
    """Pages ascending, each once.

    A guest may stand still meanwhile: NumPy's own set operations import its masked arrays
    when they are first used, which takes 10 ms.
    """
    ascending = np.sort(pages, kind="stable")
    is_first = np.ones(len(pages), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    return ascending[is_first]


def read_whole(fd: int, into: memoryview, position: int, what: str) -> bool:
    """Fill a buffer by ``preadv``, whatever becomes of the file meanwhile.

    Args:
        fd: File.
        into: Bytes to fill.
        position: Where they are in the file.
        what: What is read, for the error.

    Returns:
        False where the file ends before.

    Raises:
        GuestError: It cannot be read.
    """
    while into:
        try:
            done = os.preadv(fd, (into,), position)
        except OSError as error:
            raise GuestError(f"reading {what}: {error.strerror}") from error
        if not done:
            return False
        into, position = into[done:], position + done
    return True


def _write_error(error: OSError) -> GuestError:
    return GuestError(f"writing the guest's file: {error.strerror}")

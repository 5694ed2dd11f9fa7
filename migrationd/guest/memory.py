"""Where the pages of one RAM block live.

Pages are placed from the receive buffer, a strided array, by one NumPy copy or one
gather write; nothing is done for a zero page that was never anything else.
"""

import contextlib
import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.linux.iovec import pwrite_rows

HUGE_PAGE_BYTES = 2 << 20
TRIM_BYTES = 64 << 10
"""Shorter runs of zero pages are not worth a system call to give back."""

_MAP_NORESERVE = 0x4000

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

    def zero_pages(self, pages: Pages) -> None:
        """Make pages zero again that held something."""

    def give_back(self, runs: Pages) -> None:
        """Release the memory of runs of zero pages, shape ``(n, 2)``: first page, count."""

    def close(self) -> None:
        """Release everything."""


class AnonymousMemory:
    """Private memory, in huge pages where the block is large enough.

    Args:
        size: Bytes, a multiple of the page size.
        page_size: Target page size in bytes.

    Raises:
        GuestError: The kernel gives no address space for it.
    """

    def __init__(self, size: int, page_size: int) -> None:
        self._page_size = page_size
        length = max(size, mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(
                -1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )
        except (OSError, OverflowError, ValueError) as error:
            raise GuestError(f"cannot map {size} bytes of guest memory: {error}") from error
        if size >= HUGE_PAGE_BYTES:
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view: Bytes = np.frombuffer(self._map, np.uint8, size)
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
        target = memoryview(self._map)
        source = memoryview(buffer)
        for page, at in zip(pages, content_at, strict=True):
            target[page * size : (page + 1) * size] = source[at : at + size]

    def zero_pages(self, pages: Pages) -> None:
        """Fill pages with zero."""
        self._pages[pages] = 0

    def give_back(self, runs: Pages) -> None:
        """Give long runs back to the kernel; they read as zero."""
        for first, count in runs.tolist():
            if count * self._page_size >= TRIM_BYTES:
                start = -(-first * self._page_size // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (first + count) * self._page_size // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmap; a view that is still in use keeps the mapping until it goes."""
        del self.view, self._pages
        with contextlib.suppress(BufferError):
            self._map.close()


class FileMemory:
    """Pages in a file, at their place in a mapped-ram file's pages area.

    Writes go by ``pwritev`` straight from the receive buffer; reads come from a shared
    mapping of the same page cache. A zero page is a hole, or is marked absent by the
    file's bitmap, so zeroing one only has to keep the mapping true.

    Args:
        fd: File, open for reading and, unless it is only read, writing; not owned.
        position: Where the pages area begins; a multiple of the host page size.
        size: Bytes of the block.
        page_size: Target page size in bytes.

    Raises:
        GuestError: The area cannot be mapped.
    """

    def __init__(self, fd: int, position: int, size: int, page_size: int) -> None:
        self._fd = fd
        self._position = position
        self._page_size = page_size
        try:
            self._map = mmap.mmap(
                fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=position
            )
        except (OSError, OverflowError, ValueError) as error:
            raise GuestError(f"cannot map {size} bytes of the guest's file: {error}") from error
        self.view: Bytes = np.frombuffer(self._map, np.uint8, size)

    def place_run(self, first_page: int, data: Bytes) -> None:
        """Write consecutive pages by gather writes."""
        try:
            pwrite_rows(self._fd, data, self._position + first_page * self._page_size)
        except OSError as error:
            raise GuestError(f"writing the guest's file: {error.strerror}") from error

    def place_pages(self, pages: Pages, data: Bytes) -> None:
        """Write pages, each run of consecutive ones by one call."""
        ends = np.flatnonzero(np.diff(pages) != 1) + 1
        for begin, end in zip((0, *ends.tolist()), (*ends.tolist(), len(pages)), strict=True):
            self.place_run(int(pages[begin]), data[begin:end])

    def place_scattered(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """Write pages one by one."""
        for page, at in zip(pages, content_at, strict=True):
            content = np.frombuffer(buffer, np.uint8, self._page_size, at)
            self.place_run(page, content.reshape(1, -1))

    def zero_pages(self, pages: Pages) -> None:
        """Write zeros over pages."""
        zeros = np.broadcast_to(np.zeros(self._page_size, np.uint8), (1, self._page_size))
        for page in pages.tolist():
            self.place_run(page, zeros)

    def give_back(self, runs: Pages) -> None:
        """Nothing: what was never written is a hole already."""

    def close(self) -> None:
        """Unmap; the file stays."""
        del self.view
        with contextlib.suppress(BufferError):
            self._map.close()

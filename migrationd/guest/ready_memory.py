"""Memory that is made ready before a guest comes.

The first touch of a page costs the kernel more than receiving it does. Where the size of the
next guest is known, that is paid while nobody waits, as QEMU's ``prealloc=on`` does.
"""

import logging
import mmap
import threading

import numpy as np

from migrationd.guest.memory import (
    HUGE_PAGE_BYTES,
    AnonymousMemory,
    MappedMemory,
    map_anonymous,
)
from migrationd.linux.iovec import address_of
from migrationd.linux.populate import populate_write

log = logging.getLogger(__name__)

_STEP_BYTES = 64 << 20
"""Touched between two looks at whether to go on."""


class ReadyMemory:
    """One piece of anonymous memory, in huge pages, that RAM blocks are cut from.

    Blocks come and go on any thread. When the last one has gone, all of it is zero again.

    Args:
        size: Bytes.

    Raises:
        GuestError: The kernel gives no address space for it.
    """

    def __init__(self, size: int) -> None:
        self._size = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self._map = map_anonymous(self._size)
        self._address = address_of(np.frombuffer(self._map, np.uint8))
        self._lock = threading.Lock()
        self._taken_bytes = 0
        self._in_use = 0
        self._is_closed = False

    def make_ready(self) -> None:
        """Touch all of it, unless a block is taken meanwhile. Takes 0.1 to 0.5 s per GiB."""
        at = 0
        while at < self._size:
            if self._in_use or self._is_closed:
                return
            length = min(_STEP_BYTES, self._size - at)
            try:
                populate_write(self._address + at, length)
            except OSError as error:
                log.warning("only %d MiB of -ram-prealloc are ready: %s", at >> 20, error.strerror)
                return
            at += length
        log.info("%d MiB of memory are ready for a guest", self._size >> 20)

    def take(self, size: int, page_size: int) -> AnonymousMemory:
        """Memory for a block; from elsewhere if it does not fit.

        Args:
            size: Bytes, a multiple of the page size.
            page_size: Target page size in bytes.

        Raises:
            GuestError: The kernel gives no address space for it.
        """
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            at = self._taken_bytes
            if size >= HUGE_PAGE_BYTES:
                at = -(-at // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            if not length or at + length > self._size:
                return AnonymousMemory(size, page_size)
            self._taken_bytes = at + length
            self._in_use += 1
        return _ReadyBlock(self, self._map, at, size, page_size)

    def give_back_rest(self) -> None:
        """Give back what the guest that came did not need."""
        with self._lock:
            at = self._taken_bytes
            if self._in_use and at < self._size:
                self._taken_bytes = self._size
                self._map.madvise(mmap.MADV_DONTNEED, at, self._size - at)

    def put_back(self) -> None:
        """A block of it is not used any more."""
        with self._lock:
            self._in_use -= 1
            if not self._in_use:
                self._taken_bytes = 0
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Nobody comes any more; what is taken stays until it is given back."""
        with self._lock:
            self._is_closed = True


class _ReadyBlock(AnonymousMemory):
    """A block's part of the ready memory."""

    def __init__(
        self, ready: ReadyMemory, mapping: mmap.mmap, at: int, size: int, page_size: int
    ) -> None:
        self._ready: ReadyMemory | None = ready
        MappedMemory.__init__(self, mapping, size, page_size, at)
        self._is_huge = size >= HUGE_PAGE_BYTES

    def close(self) -> None:
        """Put it back, once."""
        ready, self._ready = self._ready, None
        if ready is not None:
            del self.view, self._pages
            ready.put_back()

"""Faults of another process, read from its userfaultfd: threads that wait for a page.

Reference: ``struct uffd_msg`` of ``userfaultfd(2)``.
"""

import ctypes
import errno
import mmap
import os
import select
import struct

from migrationd.errors import GuestError, WorkloadGone

FAULTS_MAX = 64
"""Faults of one read."""

_EVENT_PAGEFAULT = 0x12
_FAULT = struct.Struct("=B7xQQI4x")

# It never waits, and is shorter than getting the GIL back.
_read = ctypes.PyDLL(None, use_errno=True).read
_read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_read.restype = ctypes.c_ssize_t


class FaultReader:
    """Waits for faults on one thread; any other may end that.

    Args:
        fd: The userfaultfd, non-blocking; not owned.

    Attributes:
        has_faults: Whether :meth:`wait` found some to read.
        has_input: Whether it found input of another descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)
        self._data = ctypes.create_string_buffer(FAULTS_MAX * _FAULT.size)
        self._view = memoryview(self._data)
        self._address = ctypes.addressof(self._data)
        self._is_ended = self._leaves_faults = False
        self.has_faults = self.has_input = False

    def wait(self, *, leaves_faults_ms: int | None = None) -> bool:
        """Wait until there may be faults to :meth:`read`, or something else is to be looked at.

        Args:
            leaves_faults_ms: Do not wait for faults, and so long at most.

        Returns:
            False when :meth:`end` was called.
        """
        if self._leaves_faults != (leaves_faults_ms is not None):
            self._leaves_faults = not self._leaves_faults
            self._poll.modify(self._fd, 0 if self._leaves_faults else select.POLLIN)
        self.has_faults = self.has_input = False
        for fd, _ in self._poll.poll(leaves_faults_ms):
            if fd == self._fd:
                self.has_faults = True
            elif fd == self._bell:
                os.eventfd_read(fd)
            else:
                self.has_input = True
        return not self._is_ended

    def wait_for(self, fd: int) -> None:
        """Let :meth:`wait` return for input of another descriptor, too; on its thread."""
        self._poll.register(fd, select.POLLIN)

    def wait_no_more_for(self, fd: int) -> None:
        """Take :meth:`wait_for` back."""
        self._poll.unregister(fd)

    def read(self) -> list[tuple[int, int]]:
        """Faults that wait, without waiting for one; on one thread.

        Returns:
            Of each the address, rounded down to its page, and the thread, 0 if the kernel does
            not tell.

        Raises:
            GuestError: The process is gone.
        """
        count = _read(self._fd, self._address, len(self._data))
        if count < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return []
            if number == errno.ESRCH:
                raise WorkloadGone
            raise GuestError(f"userfaultfd: reading faults: {os.strerror(number)}")
        return [
            (address & -mmap.PAGESIZE, thread)
            for event, _, address, thread in _FAULT.iter_unpack(self._view[:count])
            if event == _EVENT_PAGEFAULT
        ]

    def look_up(self) -> None:
        """Let :meth:`wait` return once; from any thread."""
        os.eventfd_write(self._bell, 1)

    def end(self) -> None:
        """Let :meth:`wait` return False from now on; from any thread."""
        self._is_ended = True
        self.look_up()

    def close(self) -> None:
        """Release what was opened here; nobody may wait any more."""
        os.close(self._bell)

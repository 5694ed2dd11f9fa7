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
_FAULT_BYTES = 32
_FAULT = struct.Struct("=B7xQQI4x")

# It never waits, and is shorter than getting the GIL back.
_read = ctypes.PyDLL(None, use_errno=True).read
_read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_read.restype = ctypes.c_ssize_t


def read_faults(fd: int) -> list[tuple[int, int]]:
    """Faults that wait, without waiting for one.

    Args:
        fd: A userfaultfd.

    Returns:
        Of each the address, rounded down to its page, and the thread, 0 if the kernel does not
        tell.

    Raises:
        GuestError: The process is gone.
    """
    data = ctypes.create_string_buffer(FAULTS_MAX * _FAULT_BYTES)
    count = _read(fd, data, len(data))
    if count < 0:
        number = ctypes.get_errno()
        if number in (errno.EAGAIN, errno.EINTR):
            return []
        if number == errno.ESRCH:
            raise WorkloadGone
        raise GuestError(f"userfaultfd: reading faults: {os.strerror(number)}")
    return [
        (address & -mmap.PAGESIZE, thread)
        for event, _, address, thread in _FAULT.iter_unpack(data.raw[:count])
        if event == _EVENT_PAGEFAULT
    ]


class FaultReader:
    """Waits for faults on one thread; any other may end that.

    Args:
        fd: The userfaultfd, non-blocking; not owned.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)

    def wait(self) -> bool:
        """Wait until there may be faults to :meth:`read`; False when :meth:`end` was called."""
        ready = dict(self._poll.poll())
        return self._bell not in ready

    def read(self) -> list[tuple[int, int]]:
        """See :func:`read_faults`."""
        return read_faults(self._fd)

    def end(self) -> None:
        """Let :meth:`wait` return False from now on."""
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Release what was opened here; nobody may wait any more."""
        os.close(self._bell)

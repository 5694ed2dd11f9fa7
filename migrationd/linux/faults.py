"""Writes that threads of another process wait for, read from its userfaultfd.

Reference: ``struct uffd_msg`` of ``userfaultfd(2)``.
"""

import os
import select

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError

_BATCH = 64
_EVENT_PAGEFAULT = 0x12
_MESSAGE = np.dtype(
    {
        "names": ["event", "address"],
        "formats": ["u1", "<u8"],
        "offsets": [0, 16],
        "itemsize": 32,
    }
)

Addresses = npt.NDArray[np.uint64]


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

    def read(self, timeout_s: float | None = None) -> Addresses | None:
        """Addresses of the next faults, in the order in which they came.

        Args:
            timeout_s: Longest wait; None for as long as it takes.

        Returns:
            Shape ``(n,)``; empty when the time is over; None when :meth:`end` was called.

        Raises:
            GuestError: The process is gone.
        """
        ready = dict(self._poll.poll(None if timeout_s is None else timeout_s * 1000))
        if self._bell in ready:
            return None
        if not ready:
            return np.empty(0, np.uint64)
        try:
            data = os.read(self._fd, _BATCH * _MESSAGE.itemsize)
        except BlockingIOError:
            return np.empty(0, np.uint64)  # the thread was woken, or has died
        except OSError as error:
            raise GuestError(f"userfaultfd: {error.strerror}") from error
        faults = np.frombuffer(data, _MESSAGE)
        addresses: Addresses = faults["address"][faults["event"] == _EVENT_PAGEFAULT]
        return addresses

    def end(self) -> None:
        """Let :meth:`read` return None from now on."""
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Release what was opened here; nobody may read any more."""
        os.close(self._bell)

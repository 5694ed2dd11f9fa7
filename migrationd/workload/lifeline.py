"""A pipe whose other end the daemon holds: while it is armed, this process ends with it.

The kernel sends the signal. That works also where no code of this process can run, because
a thread waits for a page that only the daemon could bring, with the interpreter's lock.

Reference: ``F_SETSIG`` and ``O_ASYNC``, ``fcntl(2)``.
"""

import fcntl
import os
import signal

_F_SETSIG = 10


class Lifeline:
    """One such pipe.

    Args:
        fd: Its reading end; stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        os.set_inheritable(self._fd, False)

    def arm(self) -> None:
        """From now on end with the daemon; at once if it is gone already."""
        fcntl.fcntl(self._fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._fd, _F_SETSIG, signal.SIGKILL)
        self._set_async(os.O_ASYNC)
        os.set_blocking(self._fd, False)
        try:
            gone = os.read(self._fd, 1) == b""
        except BlockingIOError:
            gone = False
        if gone:
            os.kill(os.getpid(), signal.SIGKILL)

    def disarm(self) -> None:
        """Outlive the daemon again."""
        self._set_async(0)

    def close(self) -> None:
        """Let go of it."""
        self.disarm()
        os.close(self._fd)

    def _set_async(self, flag: int) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_ASYNC
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | flag)

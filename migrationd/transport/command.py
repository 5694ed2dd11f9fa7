"""The process behind an ``exec:`` channel.

It runs in a session of its own, so that a pipeline of a shell ends as a whole. It is
waited for through a pidfd, together with a descriptor that ends the wait.

Reference: ``exec:`` of QEMU; the source writes to the command's standard input, the
destination reads its standard output.
"""

import contextlib
import os
import select
import signal
import subprocess
import threading

from migrationd.errors import ConnectFailed

TERMINATE_GRACE_MS = 20
"""Time between SIGTERM and SIGKILL; the event loop may have to wait for it."""


class Command:
    """A started command; owns the process until :meth:`reap`.

    Args:
        process: The process, leader of its own process group.
        is_writer: Whether it writes the stream. It may then end as it likes when nobody
            reads on; a reader that fails has not kept the stream.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, is_writer: bool) -> None:
        self._process = process
        self.is_writer = is_writer
        self._pidfd = os.pidfd_open(process.pid)
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Process id, which is the process group's as well."""
        return self._process.pid

    def wait(self, wakeup_fd: int) -> int | None:
        """Block until the command has ended by itself.

        Args:
            wakeup_fd: Ends the wait when it becomes readable.

        Returns:
            Exit status, negative for a signal; None when the wait was ended.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(wakeup_fd, select.POLLIN)
        poll.poll()
        return self._process.wait() if self._has_ended(0) else None

    def terminate(self) -> None:
        """Ask the whole process group to end; from any thread, returns at once."""
        self._signal(signal.SIGTERM)

    def reap(self) -> None:
        """End what still runs and collect the process; any number of times."""
        with self._lock:
            if self._pidfd < 0:
                return
        if not self._has_ended(0):
            self._signal(signal.SIGTERM)
            if not self._has_ended(TERMINATE_GRACE_MS):
                self._signal(signal.SIGKILL)
        with self._lock:
            self._process.wait()
            os.close(self._pidfd)
            self._pidfd = -1

    def _has_ended(self, timeout_ms: int) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def _signal(self, number: signal.Signals) -> None:
        # The group's number belongs to us until its leader is collected, and only then.
        with self._lock:
            if self._pidfd >= 0 and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)


def start_command(args: tuple[str, ...], *, outgoing: bool) -> tuple[int, Command]:
    """Start a command with a pipe to its input (outgoing) or from its output.

    Returns:
        Our end of the pipe, and the command.

    Raises:
        ConnectFailed: It cannot be started.
    """
    try:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise _not_started(args, error) from error
    ours, theirs = (write_fd, read_fd) if outgoing else (read_fd, write_fd)
    try:
        process = subprocess.Popen(
            args,
            stdin=theirs if outgoing else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if outgoing else theirs,
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours)
        raise _not_started(args, error) from error
    finally:
        os.close(theirs)
    try:
        return ours, Command(process, is_writer=not outgoing)
    except OSError as error:
        os.close(ours)
        process.kill()
        process.wait()
        raise _not_started(args, error) from error


def _not_started(args: tuple[str, ...], error: OSError) -> ConnectFailed:
    return ConnectFailed(f"Failed to execute child process “{args[0]}” ({error.strerror})")

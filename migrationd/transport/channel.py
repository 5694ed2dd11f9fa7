"""A byte channel over one descriptor: socket, pipe or file.

Data calls block and are made on a thread of their own; :meth:`Channel.shutdown` ends
them from any other thread, which is how a migration is cancelled. The return path
reads the same descriptor on the event loop.

Sockets stay in blocking mode (the kernel sleeps until there is a useful amount of
space) and end by ``shutdown(2)``; everything else is non-blocking and polled together
with an eventfd.

Reference: error texts are those of QEMU's channels.
"""

import asyncio
import contextlib
import os
import select
import socket
import stat
import subprocess
import threading

import numpy as np
import numpy.typing as npt

from migrationd.errors import ChannelClosed
from migrationd.linux.iovec import (
    Vector,
    address_of,
    page_vector,
    rest_of,
    send_vector,
    write_vector,
)

CHILD_EXIT_S = 10.0
"""How long the end of an ``exec:`` command is waited for before it is killed."""

_PIPE_BYTES = 1 << 20


class Channel:
    """One open channel; owns its descriptor.

    Args:
        fd: Open descriptor.
        child: Process behind an ``exec:`` channel.
        is_durable: Regular file that must be on stable storage when :meth:`finish` returns.
    """

    def __init__(
        self, fd: int, *, child: subprocess.Popen[bytes] | None = None, is_durable: bool = False
    ) -> None:
        mode = os.fstat(fd).st_mode
        self.is_socket = stat.S_ISSOCK(mode)
        self.is_duplex = self.is_socket
        self._is_regular = stat.S_ISREG(mode)
        self._kind = "socket" if self.is_socket else "file" if self._is_regular else "command"
        self._socket = socket.socket(fileno=fd) if self.is_socket else None
        self._fd = fd
        self._child = child
        self._is_durable = is_durable
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_down = threading.Event()
        self._lock = threading.Lock()
        self._is_closed = False
        os.set_inheritable(fd, False)
        if self._socket is not None:
            self._socket.setblocking(True)
            if self._socket.family in (socket.AF_INET, socket.AF_INET6):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            os.set_blocking(fd, False)
            if stat.S_ISFIFO(mode):
                _enlarge_pipe(fd)

    def recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """Receive what is there, at least one byte.

        Returns:
            Bytes received; 0 at the end of the input.

        Raises:
            TimeoutError: Nothing came in time.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        while True:
            try:
                count = self._try_recv(view)
            except BlockingIOError:
                if not self._wait(select.POLLIN, timeout_s):
                    raise TimeoutError from None
                continue
            except OSError as error:
                raise self._broken("read from", error) from error
            if self._is_down.is_set():
                raise ChannelClosed("the channel was shut down")
            return count

    def recv_some(self, max_bytes: int) -> bytes:
        """Receive without waiting; for the event loop.

        Returns:
            Bytes, empty at the end of the input.

        Raises:
            BlockingIOError: Nothing is there.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        data = bytearray(max_bytes)
        try:
            count = self._try_recv(memoryview(data))
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._broken("read from", error) from error
        return bytes(data[:count])

    async def wait_readable(self) -> None:
        """Wait on the event loop until :meth:`recv_some` has something to say.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        if self._is_down.is_set():
            raise ChannelClosed("the channel was shut down")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._fd, wake)
        loop.add_reader(self._wakeup, wake)
        try:
            await ready
        finally:
            loop.remove_reader(self._fd)
            loop.remove_reader(self._wakeup)
        if self._is_down.is_set():
            raise ChannelClosed("the channel was shut down")

    def send(self, data: bytes | memoryview) -> None:
        """Send everything.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        array = np.frombuffer(data, np.uint8)
        if len(array):
            self.send_vector(np.array([[address_of(array), len(array)]], np.uint64))

    def send_pages(
        self,
        prefix: bytes,
        headers: npt.NDArray[np.uint8],
        memory: npt.NDArray[np.uint8],
        pages: npt.NDArray[np.int64],
        page_size: int,
    ) -> int:
        """Send a prefix and then, for each page, its header and its content.

        Args:
            prefix: Bytes that go first; may be empty.
            headers: One header per page, shape ``(n, h)``, contiguous.
            memory: Mapped memory of the whole RAM block.
            pages: Page numbers in it, shape ``(n,)``.
            page_size: Bytes of a page.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        vector = page_vector(headers, memory, pages, page_size)
        lead = np.frombuffer(prefix, np.uint8) if prefix else None
        if lead is not None:
            head = np.array([[address_of(lead), len(lead)]], np.uint64)
            vector = np.concatenate((head, vector))
        size = int(vector[:, 1].sum())
        self.send_vector(vector)
        return size

    def send_vector(self, vector: Vector) -> None:
        """Send all of a gather vector; what it points to must live until this returns.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        call = send_vector if self.is_socket else write_vector
        while len(vector):
            if self._is_down.is_set():
                raise ChannelClosed("the channel was shut down")
            try:
                done = call(self._fd, vector)
            except BlockingIOError:
                self._wait(select.POLLOUT, None)
                continue
            except InterruptedError:
                continue
            except OSError as error:
                raise self._broken("write to", error) from error
            vector = rest_of(vector, done)

    def finish(self) -> None:
        """End an outgoing stream: a command has taken everything, a file is stored.

        Raises:
            ChannelClosed: The command failed, or the file could not be stored.
        """
        if self._is_regular and self._is_durable:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                raise self._broken("write to", error) from error
        if self._child is not None:
            self._close_fd()
            self._await_child(self._child)

    def shutdown(self) -> None:
        """End every blocked and future data call; from any thread, any number of times."""
        with self._lock:
            if self._is_closed or self._is_down.is_set():
                return
            self._is_down.set()
            os.eventfd_write(self._wakeup, 1)
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor and reap the command; no call may be under way."""
        self.shutdown()
        self._close_fd()
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._wakeup)
        child = self._child
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 15)
            try:
                child.wait(1.0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, 9)
                child.wait()

    def _try_recv(self, view: memoryview) -> int:
        if self._socket is not None:
            return self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
        return os.readv(self._fd, (view,))

    def _wait(self, events: int, timeout_s: float | None) -> bool:
        """Wait for the descriptor; False after the timeout.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        poll = select.poll()
        poll.register(self._fd, events)
        poll.register(self._wakeup, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        if self._is_down.is_set():
            raise ChannelClosed("the channel was shut down")
        return bool(ready)

    def _await_child(self, child: subprocess.Popen[bytes]) -> None:
        try:
            status = child.wait(CHILD_EXIT_S)
        except subprocess.TimeoutExpired:
            raise ChannelClosed(
                f"the command did not end within {CHILD_EXIT_S:.0f} s after its input"
            ) from None
        if status:
            raise ChannelClosed(f"the command ended with status {status}")

    def _broken(self, what: str, error: OSError) -> ChannelClosed:
        if self._is_down.is_set():
            return ChannelClosed("the channel was shut down")
        return ChannelClosed(f"Unable to {what} {self._kind}: {error.strerror}")

    def _close_fd(self) -> None:
        with self._lock:
            if self._fd < 0:
                return
            if self._socket is not None:
                self._socket.close()
            else:
                os.close(self._fd)
            self._fd = -1


def _enlarge_pipe(fd: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

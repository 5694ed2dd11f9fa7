"""A descriptor that several threads use and any thread may end.

A call on it is made inside ``_in_use``; :meth:`SharedDescriptor.shutdown` ends the blocked ones,
and the last to leave closes: a number is never free while a call may use it.

Sockets stay in blocking mode, so that the kernel sleeps until there is a useful amount
of space, and a blocked call ends by ``shutdown(2)``. Everything else is non-blocking
and polled together with an eventfd.

Reference: error texts are those of QEMU's channels.
"""

import contextlib
import fcntl
import os
import select
import socket
import stat
import threading
from collections.abc import Iterator

from migrationd.errors import ChannelClosed, ConnectFailed
from migrationd.transport.command import Command
from migrationd.transport.tcp_queue import TcpQueue

_PIPE_BYTES = 1 << 20


class SharedDescriptor:
    """Life and end of one open descriptor, and of the command behind it.

    Args:
        fd: Open descriptor; closed with this, also when this constructor raises.
        command: Process behind an ``exec:`` channel.

    Attributes:
        is_socket: Whether it is a socket.
        is_duplex: Whether there is a way back, so that a return path is possible.
        is_seekable: Whether it is a regular file.

    Raises:
        ConnectFailed: The descriptor is none, or there are too many.
    """

    def __init__(self, fd: int, command: Command | None = None) -> None:
        try:
            mode = os.fstat(fd).st_mode
        except OSError as error:
            raise ConnectFailed(f"Failed to open a channel: {error.strerror}") from error
        self._fd = fd
        self._command = command
        self._lock = threading.Lock()
        self._is_down = False
        self._calls = 0
        self._is_closing = False
        self._wakeup = -1
        self._socket: socket.socket | None = None
        self._queue: TcpQueue | None = None
        self._must_wait_for_writer = stat.S_ISFIFO(mode)
        self.is_socket = self.is_duplex = stat.S_ISSOCK(mode)
        self.is_seekable = stat.S_ISREG(mode)
        self._kind = "socket" if self.is_socket else "command" if command else "file"
        self._in_use = _InUse(self)
        try:
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._prepare()
        except OSError as error:
            self._release()
            raise ConnectFailed(f"Failed to open a channel: {error.strerror}") from error

    @property
    def _is_inet(self) -> bool:
        return self._socket is not None and self._socket.family in (
            socket.AF_INET,
            socket.AF_INET6,
        )

    def _prepare(self) -> None:
        os.set_inheritable(self._fd, False)
        if not self.is_socket:
            os.set_blocking(self._fd, False)
            if self._must_wait_for_writer:
                with contextlib.suppress(OSError):  # more than an unprivileged user may have
                    fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            return
        self._socket = socket.socket(fileno=self._fd)
        self._socket.setblocking(True)
        if self._is_inet:
            with contextlib.suppress(OSError):  # a protocol other than TCP
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._queue = TcpQueue(self._socket)

    def peer_text(self) -> str:
        """The other end in words."""
        with contextlib.suppress(OSError), self._in_use:
            if self._socket is not None:
                name = self._socket.getpeername()
                if isinstance(name, tuple):
                    host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
                    return f"{host}:{name[1]}"
                return "a unix socket's peer"
        return "the peer"

    def is_hung_up(self) -> bool:
        """Whether the peer has closed its end, although there may be bytes to read."""
        with self._in_use:
            poll = select.poll()
            poll.register(self._fd, select.POLLRDHUP)
            return bool(poll.poll(0))

    def limit_send_queue(self, size_bytes: int) -> None:
        """Let the kernel queue about this much: what is urgent waits behind it. Sockets only."""
        with self._in_use:
            if self._socket is None:
                return
            with contextlib.suppress(OSError):  # a protocol other than TCP
                if self._is_inet:
                    self._socket.setsockopt(
                        socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size_bytes
                    )
                else:
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)

    def queued_bytes(self) -> int:
        """About how much the kernels of both ends hold for the peer; 0 but for TCP."""
        with self._in_use:
            try:
                return self._queue.size_bytes() if self._queue is not None else 0
            except OSError:  # a protocol other than TCP
                self._queue = None
                return 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing closes the descriptor inside the block; :meth:`shutdown` ends calls as ever.

        For many calls of which each counts: it is asked for once.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._in_use:
            yield

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, for what only a file can do; it stays open inside the block.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._in_use:
            yield self._fd

    @property
    def input_fd(self) -> int:
        """What to poll for input inside :meth:`held`, and never to read."""
        return self._fd

    def detach(self) -> int:
        """Give the descriptor up; the channel is closed, the connection is not.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._lock:
            self._refuse_if_down()
            fd = self._fd
            if self._socket is not None:
                self._socket.detach()
            self._socket = None
            self._fd = -1
        self.close()
        return fd

    def shutdown(self) -> None:
        """End every blocked and future data call; from any thread, any number of times."""
        with self._lock:
            if self._is_down:
                return
            self._is_down = True
            os.eventfd_write(self._wakeup, 1)
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            if self._command is not None:
                self._command.terminate()

    def close(self) -> None:
        """Shut down, close the descriptor and end the command; any number of times.

        Where a data call is still under way on another thread, it is woken, and closes on
        its way out: a descriptor number is never free while a call may use it.
        """
        self.shutdown()
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            is_idle = not self._calls
        if is_idle:
            self._release()

    def _release(self) -> None:
        self._close_fd()
        with self._lock:
            if self._wakeup >= 0:
                os.close(self._wakeup)
                self._wakeup = -1
        if self._command is not None:
            self._command.reap()

    def _wait(self, events: int, timeout_s: float | None) -> None:
        """Block until the descriptor is ready.

        Raises:
            TimeoutError: It is not, after this time.
            ChannelClosed: The channel was shut down.
        """
        poll = select.poll()
        poll.register(self._fd, events)
        poll.register(self._wakeup, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        self._refuse_if_down()
        if not ready:
            raise TimeoutError

    def _refuse_if_down(self) -> None:
        if self._is_down:
            raise ChannelClosed("the channel was shut down")

    def _broken(self, what: str, error: OSError) -> ChannelClosed:
        if self._is_down:
            return ChannelClosed("the channel was shut down")
        return ChannelClosed(f"Unable to {what} {self._kind}: {error.strerror}")

    def _close_fd(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            elif self._fd >= 0:
                os.close(self._fd)
            self._socket = None
            self._fd = -1

    def _enter(self) -> None:
        with self._lock:
            self._refuse_if_down()
            self._calls += 1

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            is_last = self._is_closing and not self._calls
        if is_last:
            self._release()


class _InUse:
    """``with`` block of a data call."""

    __slots__ = ("_channel",)

    def __init__(self, channel: SharedDescriptor) -> None:
        self._channel = channel

    def __enter__(self) -> None:
        self._channel._enter()

    def __exit__(self, *_: object) -> None:
        self._channel._leave()

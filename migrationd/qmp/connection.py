"""The byte stream of one monitor client: a socket, or standard input and output.

Reads the socket itself: the event loops' own streams lose descriptors that travel
with the bytes. Nothing here waits; who uses it is called when there is something to do.
"""

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Protocol

from migrationd.linux.scm_rights import recv_with_fds

RECEIVE_BYTES = 64 << 10


class Connection(Protocol):
    """A client's bytes."""

    def recv(self) -> tuple[bytes, list[int]]:
        """Bytes and the descriptors that came with them; empty at the end.

        Raises:
            BlockingIOError: Nothing is there.
        """

    def send(self, data: bytes) -> int:
        """Send what can be sent now; how many bytes that was.

        Raises:
            OSError: The client has gone.
        """

    def watch_input(self, on_input: Callable[[], None] | None) -> None:
        """Be called while there is input, or no longer."""

    def watch_output(self, on_room: Callable[[], None] | None) -> None:
        """Be called while output can be sent, or no longer."""

    def close(self) -> None:
        """Watch no more, and close."""


class SocketConnection:
    """A connected stream socket; owned.

    Args:
        sock: Unix or TCP socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._watch = _Watch(sock.fileno(), sock.fileno())

    def recv(self) -> tuple[bytes, list[int]]:
        """See ``Connection.recv``."""
        try:
            return recv_with_fds(self._sock, RECEIVE_BYTES)
        except BlockingIOError:
            raise
        except OSError:
            return b"", []

    def send(self, data: bytes) -> int:
        """See ``Connection.send``."""
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def watch_input(self, on_input: Callable[[], None] | None) -> None:
        """See ``Connection.watch_input``."""
        self._watch.input(on_input)

    def watch_output(self, on_room: Callable[[], None] | None) -> None:
        """See ``Connection.watch_output``."""
        self._watch.output(on_room)

    def shutdown(self) -> None:
        """End the connection in both directions; who watches it reads its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._watch.end()
        self._sock.close()


class StdioConnection:
    """Two descriptors of the process, which stay open and keep their mode.

    Args:
        input_fd: Where the client's bytes come from.
        output_fd: Where they go to; a full pipe never blocks the process.
    """

    def __init__(self, input_fd: int = 0, output_fd: int = 1) -> None:
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._watch = _Watch(input_fd, output_fd)

    def recv(self) -> tuple[bytes, list[int]]:
        """See ``Connection.recv``."""
        if not _is_ready(self._input_fd, select.POLLIN):
            raise BlockingIOError
        try:
            return os.read(self._input_fd, RECEIVE_BYTES), []
        except BlockingIOError:
            raise
        except OSError:
            return b"", []

    def send(self, data: bytes) -> int:
        """See ``Connection.send``."""
        sent = 0
        # A write of this size into a pipe that has room does not block.
        while sent < len(data) and _is_ready(self._output_fd, select.POLLOUT):
            try:
                sent += os.write(self._output_fd, data[sent : sent + select.PIPE_BUF])
            except BlockingIOError:
                break
        return sent

    def watch_input(self, on_input: Callable[[], None] | None) -> None:
        """See ``Connection.watch_input``."""
        self._watch.input(on_input)

    def watch_output(self, on_room: Callable[[], None] | None) -> None:
        """See ``Connection.watch_output``."""
        self._watch.output(on_room)

    def close(self) -> None:
        """Watch no more: the descriptors belong to the process."""
        self._watch.end()


class _Watch:
    """Calls back while a descriptor is ready; a regular file, which cannot be polled, always is."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._is_input_watched = False
        self._is_output_watched = False
        self._always: dict[str, Callable[[], None]] = {}

    def input(self, callback: Callable[[], None] | None) -> None:
        if callback is None:
            if self._is_input_watched and self._always.pop("input", None) is None:
                self._loop.remove_reader(self._input_fd)
        elif not self._is_input_watched:
            try:
                self._loop.add_reader(self._input_fd, callback)
            except OSError:
                self._always["input"] = callback
                self._again("input", callback)
        self._is_input_watched = callback is not None

    def output(self, callback: Callable[[], None] | None) -> None:
        if callback is None:
            if self._is_output_watched and self._always.pop("output", None) is None:
                self._loop.remove_writer(self._output_fd)
        elif not self._is_output_watched:
            try:
                self._loop.add_writer(self._output_fd, callback)
            except OSError:
                self._always["output"] = callback
                self._again("output", callback)
        self._is_output_watched = callback is not None

    def end(self) -> None:
        self.input(None)
        self.output(None)

    def _again(self, name: str, callback: Callable[[], None]) -> None:
        def call() -> None:
            if self._always.get(name) is callback:
                callback()
                self._loop.call_soon(call)

        self._loop.call_soon(call)


def _is_ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(0))

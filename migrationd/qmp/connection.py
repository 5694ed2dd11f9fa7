"""The byte stream of one monitor client: a socket, or standard input and output.

Reads the socket itself: the event loops' own streams lose descriptors that travel
with the bytes.
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

    async def recv(self) -> tuple[bytes, list[int]]:
        """Bytes and the descriptors that came with them; empty at the end."""

    async def send(self, data: bytes) -> None:
        """Send everything; raises OSError when the client has gone."""

    def close(self) -> None:
        """Close; nobody may be waiting in ``recv`` or ``send``."""


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

    async def recv(self) -> tuple[bytes, list[int]]:
        """Bytes and descriptors; empty when the client has gone."""
        while True:
            try:
                return recv_with_fds(self._sock, RECEIVE_BYTES)
            except BlockingIOError:
                await _wait_readable(self._sock.fileno())
            except OSError:
                return b"", []

    async def send(self, data: bytes) -> None:
        """Send everything; raises OSError when the client has gone."""
        with contextlib.suppress(BlockingIOError):
            sent = self._sock.send(data)
            if sent == len(data):
                return
            data = data[sent:]
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def close(self) -> None:
        """Close the socket."""
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

    async def recv(self) -> tuple[bytes, list[int]]:
        """Bytes; empty at the end of the input."""
        with contextlib.suppress(OSError):  # a regular file cannot be polled
            await _wait_readable(self._input_fd)
        try:
            return os.read(self._input_fd, RECEIVE_BYTES), []
        except OSError:
            return b"", []

    async def send(self, data: bytes) -> None:
        """Write everything; raises OSError when nobody reads any more."""
        view = memoryview(data)
        while view:
            with contextlib.suppress(PermissionError):  # a regular file cannot be polled
                await _wait_writable(self._output_fd)
            # A write of this size into a pipe that has room does not block.
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._output_fd, view[: select.PIPE_BUF]) :]

    def close(self) -> None:
        """Nothing: the descriptors belong to the process."""


async def _wait_readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    await _wait(fd, loop.add_reader, loop.remove_reader)


async def _wait_writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    await _wait(fd, loop.add_writer, loop.remove_writer)


async def _wait(
    fd: int, add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool]
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, wake)
    try:
        await ready
    finally:
        remove(fd)

"""The byte stream of one monitor client: a socket, or standard input and output.

Reads the socket itself: the event loops' own streams lose descriptors that travel
with the bytes.
"""

import asyncio
import contextlib
import os
import socket
from typing import Protocol

from migrationd.linux.scm_rights import recv_with_fds

RECEIVE_BYTES = 64 << 10


class Connection(Protocol):
    """A client's bytes."""

    async def recv(self) -> tuple[bytes, list[int]]:
        """Bytes and the descriptors that came with them; empty at the end."""

    async def send(self, data: bytes) -> None:
        """Send everything."""

    def close(self) -> None:
        """Close."""


class SocketConnection:
    """A connected stream socket; owned.

    Args:
        sock: Unix or TCP socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
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
    """Standard input and output."""

    async def recv(self) -> tuple[bytes, list[int]]:
        """Bytes; empty at the end of the input."""
        with contextlib.suppress(OSError):  # a regular file cannot be polled
            await _wait_readable(0)
        return os.read(0, RECEIVE_BYTES), []

    async def send(self, data: bytes) -> None:
        """Write everything."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(1, view) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)

    def close(self) -> None:
        """Nothing: the descriptors belong to the process."""


async def _wait_readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)

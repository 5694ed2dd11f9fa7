"""A destination of a postcopy that says what it is told to say, and runs nothing."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from migrationd.codec.postcopy import encode_ping, encode_resume, encode_run
from migrationd.codec.return_path import Pong, encode_return_path
from tests.support.unix_server import UnixServer

PACKAGE_END = encode_run() + encode_ping(4)
RESUME = encode_resume()


class FakeDestination(UnixServer):
    """Takes connections one after the other on one path.

    Args:
        path: Where it listens.
        at_package: What it says once the package is there, behind PONG 0x42.
        at_resume: What it says to a new connection, and behind its RESUME.
        is_loading: Whether it says PONG 0x42.
        is_recovery: Whether the first connection is a new one for a paused guest.
        takes: Connections after which it listens no more; None: it takes all.

    Attributes:
        taken_bytes: Stream bytes so far.
    """

    def __init__(
        self,
        path: Path,
        *,
        at_package: bytes = b"",
        at_resume: tuple[bytes, bytes] = (b"", b""),
        is_loading: bool = True,
        is_recovery: bool = False,
        takes: int | None = None,
    ) -> None:
        super().__init__(path)
        self._at_package = at_package
        self._at_resume = at_resume
        self._is_loading = is_loading
        self._is_first = not is_recovery
        self._left = takes
        self.taken_bytes = 0

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._left is not None:
            self._left -= 1
            if not self._left and self._server is not None:
                self._server.close()
        serve = self._first if self._is_first else self._again
        self._is_first = False
        self._tasks.add(asyncio.create_task(self._serve(serve, reader, writer)))

    async def _serve(
        self,
        work: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                await work(reader, writer)
        finally:
            writer.transport.abort()

    async def _first(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._read_to(reader, PACKAGE_END)
        if self._is_loading:
            writer.write(encode_return_path(Pong(0x42)))
        writer.write(self._at_package)
        await writer.drain()
        await self._drain(reader)

    async def _again(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before, behind = self._at_resume
        writer.write(before)
        await self._read_to(reader, RESUME)
        writer.write(behind)
        await self._drain(reader)

    async def _read_to(self, reader: asyncio.StreamReader, mark: bytes) -> None:
        tail = b""
        while mark not in tail:
            data = await reader.read(1 << 16)
            if not data:
                return
            self.taken_bytes += len(data)
            tail = (tail + data)[-(1 << 17) :]

    async def _drain(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 20):
            self.taken_bytes += len(data)

"""A server on a UNIX socket for the length of a test."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

CLOSE_S = 1.0


async def close_all(writers: Sequence[asyncio.StreamWriter]) -> None:
    """Close connections; what was written goes out, unless a peer reads no more."""
    waits: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
    for writer in writers:
        writer.close()
        # A task of its own: to be cancelled here must not cancel what the next one waits for.
        wait = asyncio.create_task(writer.wait_closed())
        wait.add_done_callback(_hear)
        waits[wait] = writer
    if not waits:
        return
    _, late = await asyncio.wait(waits, timeout=CLOSE_S)
    for wait in late:
        waits[wait].transport.abort()
    if late:
        await asyncio.wait(late)


def _hear(wait: asyncio.Task[None]) -> None:
    """A connection may well have ended with an error."""
    if not wait.cancelled():
        wait.exception()


class UnixServer(ABC):
    """Serves each connection in a task; use it as a context manager.

    Args:
        path: Where it listens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        """Every connection, accepted or made: all are closed at the end."""
        self._is_over = False

    async def start(self) -> Self:
        """Begin to listen."""
        self._server = await asyncio.start_unix_server(self._connected, self._path)
        return self

    async def close(self) -> None:
        """End everything that runs, and close every connection."""
        self._is_over = True
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await close_all(self._writers)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection may have been on its way in when the server was closed.
        if self._is_over:
            writer.transport.abort()
            return
        self._writers.append(writer)
        self._accept(reader, writer)

    @abstractmethod
    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection came: begin a task and keep it."""

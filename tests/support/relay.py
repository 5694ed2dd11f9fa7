"""A network of our own between two ends: it can be cut, as a whole, at any time."""

import asyncio
import contextlib
from pathlib import Path

from tests.support.unix_server import UnixServer

CHUNK_BYTES = 16 << 10


class Relay(UnixServer):
    """Passes unix-socket connections on; all of them break together.

    Args:
        listen_path: Where the source connects to.
        connect_path: Where the destination listens.

    Attributes:
        connections: How many came.
        passed_bytes: Stream bytes that went to the destination, all connections together.
        is_cut: Whether it broke; it takes no further connections then.
    """

    def __init__(self, listen_path: Path, connect_path: Path) -> None:
        super().__init__(listen_path)
        self._connect_path = connect_path
        self._cut_at_bytes: int | None = None
        self._cut_at_answer: bytes | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._answering = asyncio.Event()
        self._answering.set()
        self.connections = 0
        self.passed_bytes = 0
        self.is_cut = False

    @property
    def uri(self) -> str:
        """Where the source goes."""
        return f"unix:{self._path}"

    def cut_after(self, more_bytes: int) -> None:
        """Cut once so many more stream bytes have passed, to the byte."""
        self._cut_at_bytes = self.passed_bytes + more_bytes

    def cut_at_answer(self, mark: bytes) -> None:
        """Cut where these bytes begin to come back: they, and what follows them, are lost."""
        self._cut_at_answer = mark

    def cut(self) -> None:
        """Break every connection, both ways, and take no more."""
        self.is_cut = True
        self._flowing.set()
        self._answering.set()
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            # What was written has arrived: a unix socket loses nothing on close.
            writer.close()

    def stall(self) -> None:
        """Pass nothing on any more, as if packets were lost; connections stay."""
        self._flowing.clear()

    def hold_answers(self) -> None:
        """Pass on what goes to the destination only."""
        self._answering.clear()

    async def close(self) -> None:
        """Cut, and end everything that runs."""
        self.cut()
        await super().close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_unix_connection(self._connect_path)
        except OSError:
            writer.transport.abort()
            return
        self._writers.append(back_writer)
        if self.is_cut:
            self.cut()
        with contextlib.suppress(OSError):
            await asyncio.gather(
                self._pass(reader, back_writer, counts=True),
                self._pass(back_reader, writer, counts=False),
            )
        for end in (writer, back_writer):
            end.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool
    ) -> None:
        while True:
            data = await reader.read(CHUNK_BYTES)
            await self._flowing.wait()
            if not counts:
                await self._answering.wait()
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            if counts and self._cut_at_bytes is not None:
                data = data[: max(0, self._cut_at_bytes - self.passed_bytes)]
            if counts:
                self.passed_bytes += len(data)
            elif self._cut_at_answer is not None and self._cut_at_answer in data:
                writer.write(data[: data.index(self._cut_at_answer)])
                await asyncio.sleep(0)
                self.cut()
                return
            writer.write(data)
            await writer.drain()
            if counts and self.passed_bytes == self._cut_at_bytes:
                await asyncio.sleep(0)
                self.cut()
                return

"""Peers that misbehave on purpose: connections cut at a byte, readers that stall."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.unix_server import UnixServer

CHUNK_BYTES = 64 << 10


class CuttingProxy(UnixServer):
    """A unix-socket proxy that breaks the connection after an exact number of stream bytes.

    Bytes of the return path pass unless they are held back.

    Args:
        listen_path: Where the source connects to.
        connect_path: Where the destination listens.
        cut_after_bytes: Stream bytes that pass; None for all of them.
        at_cut: Called when they have passed, before the connections close.
        withholds_answers_behind: Swallow what the destination says, as if it were lost on the
            way, as soon as these bytes have passed in the stream; of no bytes, from the start.

    Attributes:
        passed_bytes: Stream bytes that went to the destination.
        answers: What the destination said.
    """

    def __init__(
        self,
        listen_path: Path,
        connect_path: Path,
        *,
        cut_after_bytes: int | None = None,
        at_cut: Callable[[], Awaitable[object]] | None = None,
        withholds_answers_behind: bytes | None = None,
    ) -> None:
        super().__init__(listen_path)
        self._connect_path = connect_path
        self._left = cut_after_bytes
        self._at_cut = at_cut
        self._mark = withholds_answers_behind
        self._withholds_answers = withholds_answers_behind == b""
        self.passed_bytes = 0
        self.answers = bytearray()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_unix_connection(self._connect_path)
        self._writers.append(back_writer)
        answers = asyncio.create_task(self._answers(back_reader, writer))
        try:
            with contextlib.suppress(OSError):
                await self._stream(reader, back_writer)
                if self._left is None:
                    back_writer.write_eof()
                    await answers
            if self._left == 0 and self._at_cut is not None:
                await self._at_cut()
        finally:
            answers.cancel()
            # What was written has arrived: a unix socket loses nothing on close.
            for end in (writer, back_writer):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = b""
        while self._left != 0:
            want = CHUNK_BYTES if self._left is None else min(CHUNK_BYTES, self._left)
            data = await reader.read(want)
            if not data:
                return
            if self._mark:
                self._withholds_answers |= self._mark in end + data
                end = (end + data)[-len(self._mark) :]
            writer.write(data)
            await writer.drain()
            self.passed_bytes += len(data)
            if self._left is not None:
                self._left -= len(data)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                self.answers += data
                if not self._withholds_answers:
                    writer.write(data)
                    await writer.drain()


class Sink:
    """A destination that takes a whole stream and never answers.

    Args:
        path: Where it listens.

    Attributes:
        taken_bytes: Stream bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self.taken_bytes = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                self.taken_bytes += len(data)
        writer.close()

"""A proxy between a source and a destination that breaks one of several connections."""

import asyncio
import contextlib
from pathlib import Path

from tests.support.peers import CHUNK_BYTES
from tests.support.unix_server import UnixServer, close_all


class ChannelCutter(UnixServer):
    """A unix-socket proxy for migrations with several connections.

    Args:
        listen_path: Where the source connects to.
        connect_path: Where the destination listens.
        victim: Which connection breaks, in the order in which they come.
        cut_after_bytes: Its stream bytes that pass before.

    Attributes:
        passed_bytes: Stream bytes of each connection that went to the destination.
        was_cut: Whether it came to that.
    """

    def __init__(
        self, listen_path: Path, connect_path: Path, *, victim: int = -1, cut_after_bytes: int = 0
    ) -> None:
        super().__init__(listen_path)
        self._connect_path = connect_path
        self._victim = victim
        self._cut_after_bytes = cut_after_bytes
        self.passed_bytes: list[int] = []
        self.was_cut = False

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.passed_bytes)
        self.passed_bytes.append(0)
        self._tasks.add(asyncio.create_task(self._serve(number, reader, writer)))

    async def _serve(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        ends = [writer]
        ways: set[asyncio.Task[None]] = set()
        try:
            back_reader, back_writer = await asyncio.open_unix_connection(self._connect_path)
            self._writers.append(back_writer)
            ends.append(back_writer)
            ways = {
                asyncio.create_task(self._stream(number, reader, back_writer)),
                asyncio.create_task(_answers(back_reader, writer)),
            }
            # Either end may leave first; the other one must hear of it.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await close_all(ends)

    async def _stream(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        is_victim = number == self._victim
        with contextlib.suppress(OSError):
            while True:
                left = self._cut_after_bytes - self.passed_bytes[number]
                if is_victim and not left:
                    self.was_cut = True
                    return
                want = min(CHUNK_BYTES, left) if is_victim else CHUNK_BYTES
                data = await reader.read(want)
                if not data:
                    if not is_victim:
                        writer.write_eof()
                        await asyncio.Event().wait()
                    return
                writer.write(data)
                await writer.drain()
                self.passed_bytes[number] += len(data)


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()

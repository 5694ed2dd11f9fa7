"""A source of a postcopy that is a script: right or wrong, as a test wants it."""

import asyncio
import contextlib
from pathlib import Path

from migrationd.codec.postcopy import (
    encode_advise,
    encode_packaged,
    encode_recv_bitmap,
    encode_resume,
    unpack_received,
)
from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    ResumeAck,
    ReturnPathDecoder,
    ReturnPathMessage,
    Shut,
)

PAGE = 4096
PAGES = 64
EOS = (0x10).to_bytes(8, "big")
FOOTER = bytes.fromhex("7e 00000001")
PART = bytes.fromhex("02 00000001")
END = bytes.fromhex("03 00000001") + EOS + FOOTER + b"\0"
HEAD = bytes.fromhex("5145564d 00000003 07") + (14).to_bytes(4, "big") + b"pc-i440fx-10.0"
OPEN_RETURN_PATH = bytes.fromhex("08 0001 0000")
BLOCK_LIST = (
    bytes.fromhex("01 00000001 03 72616d 00000000 00000004")
    + (PAGES * PAGE | 4).to_bytes(8, "big")
    + b"\6pc.ram" + (PAGES * PAGE).to_bytes(8, "big")
    + EOS + FOOTER
)  # fmt: skip
DEVICE = bytes.fromhex("04 00000007 05 74696d6572 00000000 00000001") + b"state" + bytes.fromhex(
    "7e 00000007"
)  # fmt: skip
LISTEN = bytes.fromhex("08 0004 0000")
RUN = bytes.fromhex("08 0005 0000")


def ping(value: int) -> bytes:
    """PING."""
    return bytes.fromhex("08 0002 0004") + value.to_bytes(4, "big")


PACKAGE = encode_packaged(LISTEN + DEVICE + ping(3) + ping(0x42) + RUN)
SETUP = HEAD + OPEN_RETURN_PATH + encode_advise([PAGE], PAGE) + BLOCK_LIST


def page(number: int, fill: bytes | None = None) -> bytes:
    """A PAGE record that names its block."""
    content = (fill or bytes([number + 1])) * PAGE
    return (number * PAGE | 8).to_bytes(8, "big") + b"\6pc.ram" + content


def part(*records: bytes) -> bytes:
    """A PART section of RAM."""
    return PART + b"".join(records) + EOS + FOOTER


class FakeSource:
    """One connection to a destination; what it answers is decoded.

    Attributes:
        answers: What it said so far.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = ReturnPathDecoder(1 << 20)
        self.answers: list[ReturnPathMessage] = []

    @classmethod
    async def connect(cls, path: Path) -> "FakeSource":
        """Connect; closed by :meth:`close`."""
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self._writer.write(data)

    async def wait_answer(self, kind: type[ReturnPathMessage], count: int = 1) -> ReturnPathMessage:
        """Wait until so many messages of a kind came; returns the last of them."""
        async with asyncio.timeout(30):
            while True:
                found = [answer for answer in self.answers if isinstance(answer, kind)]
                if len(found) >= count:
                    return found[count - 1]
                data = await self._reader.read(1 << 16)
                assert data, f"the destination closed; it said {self.answers}"
                self.answers += self._decoder.feed(data)

    async def turn(self, *records: bytes) -> None:
        """Go to postcopy, send pages."""
        self.send(SETUP + PACKAGE)
        assert await self.wait_answer(Pong, 2) == Pong(0x42)
        if records:
            self.send(part(*records))

    async def recover(self) -> list[int]:
        """Ask which pages came, and resume; returns their numbers."""
        self.send(encode_recv_bitmap("pc.ram"))
        answer = await self.wait_answer(RecvBitmap)
        assert isinstance(answer, RecvBitmap)
        self.send(encode_resume())
        assert await self.wait_answer(ResumeAck) == ResumeAck(1)
        return [int(n) for n in unpack_received("pc.ram", answer.bitmap, PAGES).nonzero()[0]]

    async def finish(self, *records: bytes) -> None:
        """Send the last pages and the end; the destination says that it has all."""
        self.send((part(*records) if records else b"") + END)
        assert await self.wait_answer(Shut) == Shut(0)

    def end(self) -> None:
        """Send no more, once what was sent has gone."""
        self._writer.write_eof()

    async def close(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

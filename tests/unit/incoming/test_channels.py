"""Which connection is which, and what is refused."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrationd.codec.multifd import Hello, encode_hello
from migrationd.errors import (
    ChannelClosed,
    ChannelError,
    MigrationdError,
    StreamCorrupt,
    StreamUnsupported,
)
from migrationd.incoming.channels import IncomingChannels
from migrationd.transport.address import UnixAddress
from migrationd.transport.listen import listen

MAIN = bytes.fromhex("5145564d00000003")
NO_UUID = bytes(16)


def hello(channel: int, uuid: bytes = NO_UUID) -> bytes:
    return encode_hello(Hello(channel, uuid))


class Source:
    """Connections to a listener, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sockets: list[socket.socket] = []

    def connect(self, first_bytes: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.sockets.append(sock)
        sock.connect(str(self._path))
        sock.sendall(first_bytes)
        return sock


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[tuple[IncomingChannels, Source]]:
    path = tmp_path / "in.sock"
    listener = await listen(UnixAddress(str(path)), lambda _: -1)
    channels = IncomingChannels(listener, wait_s=2)
    source = Source(path)
    yield channels, source
    channels.close()
    for sock in source.sockets:
        sock.close()


async def gather(channels: IncomingChannels, **needs: object) -> str:
    """What the main connection says first."""
    await channels.accept_first()
    main = await channels.gather(**needs)  # type: ignore[arg-type]
    buffer = bytearray(8)
    assert main.recv_into(memoryview(buffer), 1) == 8
    return buffer.hex()


async def test_without_multifd_the_first_connection_is_main(
    ends: tuple[IncomingChannels, Source],
) -> None:
    channels, source = ends
    source.connect(MAIN)
    assert await gather(channels) == MAIN.hex()
    with pytest.raises(FileNotFoundError):
        source.connect()


async def test_multifd_that_nobody_expects_is_named(
    ends: tuple[IncomingChannels, Source],
) -> None:
    """A QEMU whose channels are cut off may keep the main connection open and send nothing."""
    channels, source = ends
    source.connect(MAIN)
    source.connect(b"something else")
    channel = source.connect(hello(0))
    await channels.accept_first()
    with pytest.raises(StreamUnsupported, match="the source has multifd on, here it is off"):
        await channels.gather()
    channels.close()
    channel.settimeout(5)
    assert channel.recv(1) == b""


async def test_other_connections_are_no_matter(ends: tuple[IncomingChannels, Source]) -> None:
    channels, source = ends
    source.connect(MAIN)
    silent = source.connect()
    source.connect(b"something else")
    assert await gather(channels) == MAIN.hex()
    silent.settimeout(5)
    assert silent.recv(1) == b""


@pytest.mark.parametrize("order", ["m012", "210m", "1m20"])
async def test_channels_are_told_apart_in_any_order(
    ends: tuple[IncomingChannels, Source], order: str
) -> None:
    channels, source = ends
    for letter in order:
        source.connect(MAIN if letter == "m" else hello(int(letter)) + b"abc" + letter.encode())
    assert await gather(channels, multifd=3) == MAIN.hex()
    assert channels.source_uuid == NO_UUID
    for number, channel in enumerate(channels.multifd):
        buffer = bytearray(64)
        # The hello was taken, what follows was not.
        assert bytes(buffer[: channel.recv_into(memoryview(buffer), 1)]) == b"abc%d" % number


async def test_bytes_may_come_late_and_in_pieces(ends: tuple[IncomingChannels, Source]) -> None:
    channels, source = ends
    silent = [source.connect() for _ in range(3)]
    done = asyncio.create_task(gather(channels, multifd=2))
    for data in (hello(1)[:3], hello(1)[3:40], hello(1)[40:]):
        await asyncio.sleep(0.03)
        silent[0].sendall(data)
    silent[1].sendall(hello(0))
    silent[2].sendall(MAIN)
    assert await done == MAIN.hex()
    assert len(channels.multifd) == 2


async def test_the_silent_connection_is_preempt(ends: tuple[IncomingChannels, Source]) -> None:
    channels, source = ends
    urgent = source.connect()
    source.connect(hello(0))
    source.connect(MAIN)
    await gather(channels, multifd=1, expects_preempt=True)
    channel = await channels.accept_preempt()
    urgent.sendall(b"urgent")
    buffer = bytearray(10)
    assert channel.recv_into(memoryview(buffer), 1) == 6


async def test_preempt_may_come_after_all_others(ends: tuple[IncomingChannels, Source]) -> None:
    channels, source = ends
    source.connect(MAIN)
    await gather(channels, expects_preempt=True)
    waiting = asyncio.create_task(channels.accept_preempt())
    await asyncio.sleep(0.02)
    source.connect(b"u")
    assert await waiting is not None
    with pytest.raises(FileNotFoundError):
        source.connect()


@pytest.mark.parametrize(
    ("firsts", "error", "text"),
    [
        ([MAIN, MAIN], StreamCorrupt, "a second main connection"),
        ([MAIN, hello(0), hello(0)], StreamCorrupt, "channel 0 came twice"),
        ([MAIN, hello(2)], StreamCorrupt, "channel id 2 is greater than number of channels 2"),
        ([MAIN, b"GET / HTTP/1.1"], StreamCorrupt, "Unknown channel magic: 0x47455420"),
        ([MAIN, hello(0), hello(1, b"u" * 16)], StreamCorrupt, "expected uuid 0000"),
        ([MAIN, hello(0)[:4] + b"\0\0\0\2" + hello(0)[8:]], MigrationdError, "version 2"),
    ],
)
async def test_contradictions_are_refused(
    ends: tuple[IncomingChannels, Source],
    firsts: list[bytes],
    error: type[MigrationdError],
    text: str,
) -> None:
    channels, source = ends
    for first in firsts:
        source.connect(first)
    with pytest.raises(error, match=text):
        await gather(channels, multifd=2)


async def test_the_uuid_of_the_command_line_is_asked_for(
    ends: tuple[IncomingChannels, Source],
) -> None:
    channels, source = ends
    source.connect(MAIN)
    source.connect(hello(0))
    with pytest.raises(StreamCorrupt, match="expected uuid 7575"):
        await gather(channels, multifd=1, uuid=b"u" * 16)


async def test_a_channel_that_never_speaks_ends_the_wait(
    ends: tuple[IncomingChannels, Source],
) -> None:
    channels, source = ends
    for first in (MAIN, hello(1), b""):
        source.connect(first)
    with pytest.raises(ChannelError, match="only 1 of 2 multifd channels came in 2 s"):
        await gather(channels, multifd=2)


async def test_a_source_that_leaves_ends_the_wait_at_once(
    ends: tuple[IncomingChannels, Source],
) -> None:
    channels, source = ends
    main = source.connect(MAIN)
    waiting = asyncio.create_task(gather(channels, multifd=2))
    await asyncio.sleep(0.05)
    main.close()
    async with asyncio.timeout(10):
        with pytest.raises(ChannelClosed, match="while its channels were awaited"):
            await waiting

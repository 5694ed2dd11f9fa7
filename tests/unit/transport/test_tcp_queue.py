"""How much of what was written to a TCP socket nobody has read."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from migrationd.transport.channel import Channel
from migrationd.transport.tcp_queue import TcpQueue

WRITTEN = 512 << 10
MANY = 64 << 10


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    with here, there:
        yield here, there


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_nobody_reads_is_counted(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    queue = TcpQueue(here)
    assert queue.size_bytes() == 0
    here.sendall(bytes(WRITTEN))
    wait_for(lambda: MANY <= queue.size_bytes() <= 2 * WRITTEN)
    there.recv(WRITTEN, socket.MSG_WAITALL)
    wait_for(lambda: queue.size_bytes() < MANY)


def test_a_channel_tells_it_for_tcp_only(ends: tuple[socket.socket, socket.socket]) -> None:
    here, _ = ends
    channel = Channel(here.detach())
    channel.send(bytes(WRITTEN))
    wait_for(lambda: channel.queued_bytes() >= MANY)
    channel.close()
    one, other = socket.socketpair()
    with other:
        channel = Channel(one.detach())
        channel.send(b"abc")
        assert channel.queued_bytes() == 0
        channel.close()

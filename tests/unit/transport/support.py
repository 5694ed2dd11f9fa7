"""Channels of every kind in pairs, and calls on threads."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from migrationd.transport.channel import Channel

DEADLINE_S = 20.0

T = TypeVar("T")


def no_fds(name: str) -> int:
    """A look-up that must not be asked."""
    raise AssertionError(name)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def pipe_channel_to_write() -> tuple[Channel, int]:
    """A channel over a pipe, and the descriptor at which it is read."""
    read_fd, write_fd = os.pipe()
    return Channel(write_fd), read_fd


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call on a thread of its own."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 65536):
        parts.append(part)
    return b"".join(parts)

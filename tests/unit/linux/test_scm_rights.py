import os
import socket
from collections.abc import Iterator

import pytest

from migrationd.linux.scm_rights import close_all, recv_with_fds, send_with_fds
from tests.support.descriptors import open_count

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_descriptors_arrive_with_the_bytes(pair: Pair) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    assert send_with_fds(ours, b"hello", [write_end]) == 5
    data, fds = recv_with_fds(theirs, 100)
    assert data == b"hello"
    assert len(fds) == 1
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"x")
    assert os.read(read_end, 1) == b"x"
    close_all([read_end, write_end, *fds])


def test_bytes_without_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    send_with_fds(ours, b"hello", [])
    assert recv_with_fds(theirs, 3) == (b"hel", [])
    assert recv_with_fds(theirs, 3) == (b"lo", [])


def test_nothing_there_and_the_end(pair: Pair) -> None:
    ours, theirs = pair
    with pytest.raises(BlockingIOError):
        recv_with_fds(theirs, 1)
    ours.close()
    assert recv_with_fds(theirs, 1) == (b"", [])


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_surplus_descriptors_are_closed(pair: Pair, most: int) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    before = open_count()
    send_with_fds(ours, b"x", [read_end, write_end] * 4)
    _, fds = recv_with_fds(theirs, 1, most)
    assert len(fds) == most
    assert open_count() == before + most
    close_all([*fds, read_end, write_end])


def test_a_message_never_gives_more_than_the_limit(pair: Pair) -> None:
    ours, theirs = pair
    read_end, write_end = os.pipe()
    before = open_count()
    send_with_fds(ours, b"x", [read_end] * 200)
    _, fds = recv_with_fds(theirs, 1)
    assert len(fds) == 16
    close_all(fds)
    assert open_count() == before
    close_all([read_end, write_end])


def test_other_sockets_have_no_descriptors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        client.send(b"x")
        accepted.recv(1, socket.MSG_PEEK)
        assert recv_with_fds(accepted, 10) == (b"x", [])
        client.close()
        accepted.close()


def test_closing_a_closed_descriptor_is_harmless() -> None:
    close_all([-1, 1 << 20])

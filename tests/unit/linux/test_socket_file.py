import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.linux.socket_file import SocketFile


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def bound(path: str) -> Iterator[SocketFile]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        yield SocketFile(path)


def test_it_is_removed_once(bound: SocketFile, path: str) -> None:
    bound.remove()
    assert not Path(path).exists()
    bound.remove()


def test_another_socket_stays(bound: SocketFile, path: str) -> None:
    Path(path).unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        bound.remove()
        assert Path(path).is_socket()


def test_a_name_without_a_file(path: str) -> None:
    SocketFile(path).remove()

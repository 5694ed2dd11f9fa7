import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.linux.sd_notify import PassedSocket, listen_fds, notify


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        yield manager


def test_message_reaches_a_socket_with_a_path(manager: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    manager.bind(path)
    assert notify("READY=1\nSTATUS=waits", {"NOTIFY_SOCKET": path})
    assert manager.recv(100) == b"READY=1\nSTATUS=waits"


def test_message_reaches_an_abstract_socket(manager: socket.socket) -> None:
    name = f"migrationd-test-{os.getpid()}"
    manager.bind("\0" + name)
    assert notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name})
    assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("value", ["", "relative", "/nobody/listens/here"])
def test_nobody_listens(value: str) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": value})


def test_passed_descriptors_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as one, contextlib.ExitStack() as stack:
        # One behind the other, wherever this process has its others.
        fds = [os.dup2(one.fileno(), number) for number in (800, 801)]
        for fd in fds:
            stack.callback(os.close, fd)
        monkeypatch.setattr("migrationd.linux.sd_notify._FIRST_PASSED_FD", fds[0])
        for fd in fds:
            os.set_inheritable(fd, True)
        variables = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "qmp:"}
        assert listen_fds(variables, pid=7) == [
            PassedSocket(fds[0], "qmp"),
            PassedSocket(fds[1], "unknown"),
        ]
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
        assert variables == {}
        assert listen_fds(variables, pid=7) == []


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "8", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "-1"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "many"},
    ],
)
def test_descriptors_meant_for_nobody(variables: dict[str, str]) -> None:
    assert listen_fds(variables, pid=7) == []

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.daemon.passed_sockets import pair_monitors
from migrationd.errors import ConfigError
from migrationd.linux.sd_notify import PassedSocket
from migrationd.qmp.monitor_spec import MonitorSpec


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[PassedSocket]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp"))
    listener.listen()
    fd = listener.detach()
    yield PassedSocket(fd, "qmp")
    socket.close(fd)


def test_nothing_is_passed() -> None:
    spec = MonitorSpec("stdio")
    assert pair_monitors([spec], []) == [(spec, None)]


def test_socket_goes_to_the_monitor_of_its_path(unix: PassedSocket, tmp_path: Path) -> None:
    other = MonitorSpec("unix", path="/elsewhere", is_server=True)
    here = MonitorSpec("unix", path=str(tmp_path / "qmp"), is_server=True, waits=True)
    pairs = pair_monitors([other, here], [unix])
    assert [spec for spec, _ in pairs] == [other, here]
    assert pairs[0][1] is None
    listener = pairs[1][1]
    assert listener is not None
    assert listener.detach() == unix.fd


def test_socket_that_no_monitor_names_is_one_more(unix: PassedSocket, tmp_path: Path) -> None:
    spec, listener = pair_monitors([], [unix])[0]
    assert spec == MonitorSpec("unix", path=str(tmp_path / "qmp"), is_server=True)
    assert listener is not None
    assert listener.detach() == unix.fd


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        spec, inherited = pair_monitors([], [PassedSocket(listener.fileno(), "tcp")])[0]
        assert spec == MonitorSpec("tcp", host="127.0.0.1", port=port, is_server=True)
        assert inherited is not None
        inherited.detach()


def test_what_is_no_listener_is_refused(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as quiet,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        (tmp_path / "file").open("wb") as file,
    ):
        for thing in (quiet, datagrams, file):
            with pytest.raises(ConfigError, match="'x' is not a listening stream socket"):
                pair_monitors([], [PassedSocket(thing.fileno(), "x")])
            assert thing.fileno() >= 0

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ConnectError, QMPClient

from migrationd.ctl.client import ClientError, connected, parse_address, parse_size


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/x.sock", "/run/x.sock"),
        ("x.sock", "x.sock"),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("localhost:4444", ("localhost", 4444)),
        ("tcp:10.0.0.1:4444", ("10.0.0.1", 4444)),
        ("[::1]:4444", ("::1", 4444)),
        ("/run/a:1", "/run/a:1"),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address


def test_tcp_needs_a_port() -> None:
    with pytest.raises(ClientError, match="is not tcp:HOST:PORT"):
        parse_address("tcp:host")


def test_ports_have_an_end() -> None:
    with pytest.raises(ClientError, match="ports go up to 65535"):
        parse_address("host:65536")


async def test_a_host_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: QMPClient, address: object) -> None:
        raise ConnectError(
            "Failed to establish connection", socket.gaierror(-2, "Name or service not known")
        )

    monkeypatch.setattr(QMPClient, "connect", fail)
    with pytest.raises(ClientError, match="cannot connect to host:1: Name or service not known"):
        async with connected("host:1"):
            pass


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("64M", 64 << 20),
        ("1.5g", 3 << 29),
        ("2KiB", 2048),
        ("3kB", 3072),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1e3", "iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ClientError, match="is not a size"):
        parse_size(text)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="No such file or directory"):
        async with connected(str(tmp_path / "none")):
            pass


async def test_monitor_that_is_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(ClientError, match="is another one connected"):
            async with connected(path, timeout_s=0.05):
                pass


@pytest.fixture
def scripted_monitor(tmp_path: Path) -> Iterator[str]:
    """A monitor that negotiates, refuses one command and hangs up."""
    path = str(tmp_path / "qmp")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
            refusal = {"class": "GenericError", "desc": "Not now"}
            for answer in ({"return": {}}, {"error": refusal}):
                # The client sends no newline, and nothing more before the answer.
                request = json.loads(connection.recv(4096))
                answer |= {"id": request["id"]} if "id" in request else {}
                connection.sendall(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    thread.join()
    listener.close()


async def test_refusal_and_loss_are_one_line(scripted_monitor: str) -> None:
    async with connected(scripted_monitor) as monitor:
        with pytest.raises(ClientError, match=r"^Not now$"):
            await monitor.execute("migrate")
        with pytest.raises(ClientError, match="the connection ended"):
            await monitor.query_migrate()

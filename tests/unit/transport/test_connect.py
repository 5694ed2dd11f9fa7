import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrationd.errors import AddressError, ConnectFailed, MigrationdError
from migrationd.transport import resolve as resolve_module
from migrationd.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    InetAddress,
    UnixAddress,
    VsockAddress,
    parse_uri,
)
from migrationd.transport.connect import connect, is_opened_now, open_now
from migrationd.transport.listen import listen
from tests.unit.transport.support import no_fds, read_all, tcp_pair


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


async def refused(address: Address) -> str:
    with pytest.raises(MigrationdError) as caught:
        await connect(address)
    return str(caught.value)


async def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        channel = await connect(parse_uri(f"tcp:127.0.0.1:{port},keep-alive=on,keep-alive-idle=7"))
        accepted, _ = server.accept()
    channel.send(b"x")
    assert accepted.recv(1) == b"x"
    assert channel._socket is not None
    assert channel._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert channel._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
    assert channel._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    channel.close()
    accepted.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
async def test_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        channel = await connect(parse_uri(f"tcp:[::1]:{port}"))
        channel.close()
    assert await refused(parse_uri(f"tcp:[::1]:{port}")) == (
        f"Failed to connect to '::1:{port}': Connection refused"
    )


async def test_each_address_of_a_name_is_tried(
    deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [
            (2, 1, 6, "", ("127.0.0.1", deaf_port)),
            (2, 1, 6, "", server.getsockname()),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        (await connect(InetAddress("name", "1"))).close()
    assert await refused(InetAddress("name", "1")) == (
        "Failed to connect to 'name:1': Connection refused"
    )


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (
            "tcp:127.0.0.1:notaport",
            "address resolution failed for 127.0.0.1:notaport: "
            "Servname not supported for ai_socktype",
        ),
        (
            "tcp:127.0.0.1:-1",
            "address resolution failed for 127.0.0.1:-1: Servname not supported for ai_socktype",
        ),
        ("tcp:127.0.0.1:1,ipv4=off,ipv6=off", "Cannot disable IPv4 and IPv6 at same time"),
        ("tcp::1", "address resolution failed for :1: Name or service not known"),
        (
            "tcp:0.0.0.0:1,ipv6=on",
            "address resolution failed for 0.0.0.0:1: Address family for hostname not supported",
        ),
        ("vsock:a:1", "Failed to parse cid 'a'"),
        ("vsock:1:2:3", "Failed to parse port '2:3'"),
        ("vsock:2:99999999999", "Failed to parse port '99999999999'"),
        (
            "vsock:000000000000000000004294967297:1",
            "Failed to parse cid '000000000000000000004294967297'",
        ),
        ("unix:/nonexistent/s", "Failed to connect to '/nonexistent/s': No such file or directory"),
        ("unix:" + "p" * 120, f"UNIX socket path '{'p' * 120}' is too long"),
        ("fd:x", "'fd:x' is no socket address"),
        ("file:/f", "'/f' is no socket address"),
    ],
)
async def test_texts(uri: str, text: str) -> None:
    assert await refused(parse_uri(uri)) == text


async def test_nobody_listens(deaf_port: int) -> None:
    assert await refused(parse_uri(f"tcp:127.0.0.1:{deaf_port}")) == (
        f"Failed to connect to '127.0.0.1:{deaf_port}': Connection refused"
    )


async def test_a_port_above_65535_wraps_as_the_resolver_does(deaf_port: int) -> None:
    port = deaf_port + 65536
    assert await refused(InetAddress("127.0.0.1", str(port))) == (
        f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    )


async def test_unix(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    channel = await connect(UnixAddress(path))
    assert channel.is_duplex
    channel.close()
    server.close()
    assert await refused(UnixAddress(path)) == f"Failed to connect to '{path}': Connection refused"


@pytest.mark.parametrize("is_tight", [True, False])
async def test_abstract_unix(is_tight: bool) -> None:
    name = f"migrationd-test-{os.getpid()}"
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0" + (name if is_tight else name.ljust(107, "\0")))
    server.listen()
    (await connect(UnixAddress(name, is_abstract=True, is_tight=is_tight))).close()
    server.close()


async def test_a_full_backlog_is_waited_for() -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0migrationd-backlog-{os.getpid()}")
    server.listen(0)
    address = UnixAddress(f"migrationd-backlog-{os.getpid()}", is_abstract=True)
    first = await connect(address)
    second = asyncio.create_task(connect(address))
    await asyncio.sleep(0.03)
    assert not second.done()
    accepted = [server.accept()[0]]
    channel = await asyncio.wait_for(second, 5)
    accepted.append(server.accept()[0])
    channel.send(b"x")
    assert accepted[1].recv(1) == b"x"
    for used in (first, channel, server, *accepted):
        used.close()


def full_tcp_server() -> tuple[socket.socket, list[socket.socket], str]:
    """A server whose queue is full, so that a further connection hangs."""
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    clients = []
    for _ in range(2):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(server.getsockname())
        clients.append(client)
    return server, clients, f"tcp:127.0.0.1:{server.getsockname()[1]}"


async def test_cancel_while_a_connection_hangs() -> None:
    server, clients, uri = full_tcp_server()
    task = asyncio.create_task(connect(parse_uri(uri)))
    await asyncio.sleep(0.02)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for used in (server, *clients):
        used.close()


async def test_cancel_at_once(deaf_port: int) -> None:
    task = asyncio.create_task(connect(InetAddress("127.0.0.1", str(deaf_port))))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancel_while_a_name_server_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def look_up(host: bytes, *_: object, **options: int) -> list[object]:
        if options["flags"] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        asked.set()
        answer.wait(5)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    task = asyncio.create_task(connect(InetAddress("name", "1")))
    while not asked.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    answer.set()


async def test_a_resolver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert await refused(InetAddress("h", "1")) == (
        "address resolution failed for h:1: Temporary failure in name resolution"
    )


def test_a_loop_that_is_gone_when_the_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def look_up(host: bytes, *_: object, **options: int) -> list[object]:
        if options["flags"] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answer.wait(5)
        return []

    monkeypatch.setattr(resolve_module.socket, "getaddrinfo", look_up)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connect(InetAddress("name", "1")), 0.01)

    asyncio.run(give_up())
    answer.set()


async def test_no_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_socket)
    assert await refused(VsockAddress("2", "1")) == (
        "vsock is not available on this host: Address family not supported by protocol"
    )


async def test_no_multipath_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_mptcp(family: int, kind: int, protocol: int = 0) -> socket.socket:
        if protocol == 262:
            raise OSError(93, "Protocol not supported")
        return real(family, kind, protocol)

    monkeypatch.setattr(socket, "socket", no_mptcp)
    assert await refused(InetAddress("127.0.0.1", "1", mptcp=True)) == (
        "Failed to connect to '127.0.0.1:1': Protocol not supported"
    )


def test_what_opens_at_once() -> None:
    for uri, is_now in (
        ("tcp:h:1", False),
        ("unix:/s", False),
        ("vsock:1:1", False),
        ("fd:x", True),
        ("exec:x", True),
        ("file:/x", True),
        ("rdma:h:1", True),
    ):
        assert is_opened_now(parse_uri(uri)) == is_now


def opened_text(address: Address, fds: Callable[[str], int] = no_fds) -> str:
    with pytest.raises(MigrationdError) as caught:
        open_now(address, fds)
    return str(caught.value)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10)
    channel = open_now(FileAddress(str(path)), no_fds)
    channel.send(b"stream")
    channel.finish()
    channel.close()
    assert path.read_bytes() == b"stream"
    assert channel.is_seekable
    assert not channel.is_duplex


def test_a_new_file_is_for_the_owner_only(tmp_path: Path) -> None:
    open_now(FileAddress(str(tmp_path / "f")), no_fds).close()
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("length", [0, 3, 4, 100])
def test_a_file_offset_keeps_what_stands_before(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * length)
    channel = open_now(FileAddress(str(path), 4), no_fds)
    channel.send(b"stream")
    channel.close()
    assert path.read_bytes() == (b"a" * length)[:4].ljust(4, b"\0") + b"stream"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (FileAddress(""), "Could not create '': No such file or directory"),
        (
            FileAddress("/nonexistent/dir/f"),
            "Could not create '/nonexistent/dir/f': No such file or directory",
        ),
        (FileAddress("/tmp"), "Could not create '/tmp': Is a directory"),
        (ExecAddress(("/nonexistent/x",)), None),
        (
            parse_uri("rdma:h:1"),
            "RDMA ERROR: could not create CM channel",
        ),
        (InetAddress("h", "1"), "'h:1' is not opened at once"),
    ],
)
def test_open_texts(address: Address, text: str | None) -> None:
    found = opened_text(address)
    assert text is None or found == text


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1])
def test_an_offset_that_no_file_has(tmp_path: Path, offset: int) -> None:
    assert opened_text(FileAddress(str(tmp_path / "f"), offset)) == (
        f"failed to truncate migration file to offset {offset:x}: Invalid argument"
    )


def test_a_fifo_without_a_reader_does_not_hold_the_caller(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    text = opened_text(FileAddress(str(tmp_path / "f")))
    assert text == f"Could not create '{tmp_path}/f': No such device or address"


def test_a_fifo_with_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    read_fd = os.open(tmp_path / "f", os.O_RDONLY | os.O_NONBLOCK)
    channel = open_now(FileAddress(str(tmp_path / "f")), no_fds)
    channel.send(b"x" * 100_000)
    channel.close()
    os.set_blocking(read_fd, True)
    assert read_all(read_fd) == b"x" * 100_000
    os.close(read_fd)


def test_a_passed_socket() -> None:
    ours, theirs = tcp_pair()
    channel = open_now(FdAddress("migrate"), lambda name: {"migrate": ours.detach()}[name])
    assert channel.is_duplex
    channel.send(b"x")
    assert theirs.recv(1) == b"x"
    channel.close()
    theirs.close()


def test_a_passed_pipe() -> None:
    read_fd, write_fd = os.pipe()
    channel = open_now(FdAddress("p"), lambda _: write_fd)
    assert not channel.is_duplex
    channel.send(b"x")
    channel.close()
    assert read_all(read_fd) == b"x"
    os.close(read_fd)


def test_an_unknown_name_is_the_lookups_own_error() -> None:
    def look_up(name: str) -> int:
        raise AddressError(f"File descriptor named '{name}' has not been found")

    assert opened_text(FdAddress("n"), look_up) == "File descriptor named 'n' has not been found"


def test_descriptors_that_carry_no_stream(tmp_path: Path) -> None:
    file_fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    assert opened_text(FdAddress("f"), lambda _: file_fd) == (
        "fd: migration to a file is not supported. Use file: instead."
    )
    directory = os.open(tmp_path, os.O_RDONLY)
    assert opened_text(FdAddress("d"), lambda _: directory) == (
        "fd: a directory cannot carry a stream"
    )
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    assert opened_text(FdAddress("u"), lambda _: datagrams) == (
        "fd: the socket is no stream socket"
    )
    assert opened_text(FdAddress("b"), lambda _: 1 << 20) == "fd: Bad file descriptor"


@pytest.mark.parametrize("name", ["eventfd", "pidfd_open", "pipe2"])
def test_too_many_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """A channel that cannot be made closes what it was given."""

    def fail(*_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, name, fail)
    assert "Too many open files" in opened_text(ExecAddress(("/bin/cat",)))
    if name == "eventfd":
        assert opened_text(FileAddress(str(tmp_path / "f"))) == (
            "Failed to open a channel: Too many open files"
        )


async def test_too_many_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", fail)
    for uri in (f"unix:{tmp_path}/s", "tcp:127.0.0.1:1"):
        assert "Too many open files" in await refused(parse_uri(uri))
        with pytest.raises(ConnectFailed, match="Too many open files"):
            await listen(parse_uri(uri), no_fds)

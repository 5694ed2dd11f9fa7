import asyncio
import os
import socket
from pathlib import Path

import pytest
import uvloop

from migrationd.errors import ConnectFailed, MigrationdError
from migrationd.transport.address import (
    Address,
    FdAddress,
    FileAddress,
    InetAddress,
    UnixAddress,
    VsockAddress,
    parse_uri,
)
from migrationd.transport.channel import Channel
from migrationd.transport.connect import connect
from migrationd.transport.listen import Listener, listen
from tests.unit.transport.support import no_fds, tcp_pair, unix_pair

ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")


async def opened(uri: str) -> Listener:
    return await listen(parse_uri(uri), no_fds)


async def refused(address: Address) -> str:
    with pytest.raises(MigrationdError) as caught:
        await listen(address, no_fds)
    return str(caught.value)


def inet(listener: Listener, index: int = 0) -> InetAddress:
    address = listener.addresses[index]
    assert isinstance(address, InetAddress)
    return address


async def passes(listener: Listener, address: Address) -> None:
    """A byte goes each way."""
    source = await connect(address)
    destination = await asyncio.wait_for(listener.accept(), 5)
    source.send(b"a")
    assert destination.recv_into(memoryview(bytearray(9)), 5.0) == 1
    destination.send(b"b")
    assert await source.wait_readable(5.0)
    assert source.recv_some(9) == b"b"
    source.close()
    destination.close()


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "tcp:0:0", "tcp:localhost:0", "tcp::0"])
async def test_tcp(uri: str) -> None:
    listener = await opened(uri)
    port = inet(listener).port
    assert {address.port for address in listener.addresses if isinstance(address, InetAddress)} == {
        port
    }
    await passes(listener, InetAddress("127.0.0.1", port))
    listener.close()
    with pytest.raises(ConnectFailed, match="Connection refused"):
        await connect(InetAddress("127.0.0.1", port))


@ipv6
async def test_the_ipv6_wildcard_takes_ipv4_as_well() -> None:
    listener = await opened("tcp:[::]:0")
    assert listener.qapi_addresses() == [
        {"type": "inet", "host": "::", "port": inet(listener).port, "ipv6": True}
    ]
    await passes(listener, InetAddress("127.0.0.1", inet(listener).port))
    await passes(listener, InetAddress("::1", inet(listener).port))
    listener.close()


@ipv6
@pytest.mark.parametrize("option", ["ipv4=off", "ipv6=on"])
async def test_only_ipv6(option: str) -> None:
    listener = await opened(f"tcp:[::]:0,{option}")
    await passes(listener, InetAddress("::1", inet(listener).port))
    with pytest.raises(ConnectFailed, match="Connection refused"):
        await connect(InetAddress("127.0.0.1", inet(listener).port))
    listener.close()


@ipv6
async def test_no_host_means_both_families() -> None:
    listener = await opened("tcp::0")
    assert {inet(listener, i).host for i in range(2)} == {"0.0.0.0", "::"}
    for host in ("127.0.0.1", "::1"):
        await passes(listener, InetAddress(host, inet(listener).port))
    # Newest first.
    assert [entry["host"] for entry in listener.qapi_addresses()] == [
        inet(listener, 1).host,
        inet(listener, 0).host,
    ]
    listener.close()


async def test_the_next_free_port_of_a_range() -> None:
    first = await opened("tcp:127.0.0.1:0")
    port = int(inet(first).port)
    second = await opened(f"tcp:127.0.0.1:{port},to={port + 20}")
    assert port < int(inet(second).port) <= port + 20
    second.close()
    assert await refused(InetAddress("127.0.0.1", str(port), to=port)) == (
        "Failed to find an available port: Address already in use"
    )
    assert await refused(InetAddress("127.0.0.1", str(port))) == (
        "Failed to find an available port: Address already in use"
    )
    first.close()


async def test_a_closed_port_can_be_bound_again_at_once() -> None:
    listener = await opened("tcp:127.0.0.1:0")
    address = InetAddress("127.0.0.1", inet(listener).port)
    await passes(listener, address)
    listener.close()
    again = await listen(address, no_fds)
    await passes(again, address)
    again.close()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("tcp:192.0.2.1:0", "Failed to bind socket: Cannot assign requested address"),
        (
            "tcp:127.0.0.1:x",
            "address resolution failed for 127.0.0.1:x: Servname not supported for ai_socktype",
        ),
        ("tcp::0,ipv4=off,ipv6=off", "Cannot disable IPv4 and IPv6 at same time"),
        (
            "tcp:0.0.0.0:0,ipv6=on",
            "address resolution failed for 0.0.0.0:0: Address family for hostname not supported",
        ),
        (
            "unix:/nonexistent/dir/s",
            "Failed to bind socket to /nonexistent/dir/s: No such file or directory",
        ),
        ("unix:" + "p" * 108, f"UNIX socket path '{'p' * 108}' is too long"),
        ("file:/nonexistent", "Could not open '/nonexistent': No such file or directory"),
        ("file:/tmp", "Could not open '/tmp': Is a directory"),
        ("vsock:x:1", "Failed to parse cid 'x'"),
        ("rdma:127.0.0.1:1", "RDMA ERROR: could not create rdma event channel"),
    ],
)
async def test_texts(uri: str, text: str) -> None:
    assert await refused(parse_uri(uri)) == text


async def test_unix(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = await opened(f"unix:{path}")
    assert listener.qapi_addresses() == [{"type": "unix", "path": str(path)}]
    await passes(listener, UnixAddress(str(path)))
    listener.close()
    listener.close()
    assert not path.exists()


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    listener = await opened(f"unix:{path}")
    await passes(listener, UnixAddress(str(path)))
    listener.close()


async def test_another_listeners_unix_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = await opened(f"unix:{path}")
    second = await opened(f"unix:{path}")
    first.close()
    await passes(second, UnixAddress(str(path)))
    second.close()
    assert not path.exists()


async def test_a_file_in_the_way_of_a_unix_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    text = f"Failed to bind socket to {path}: Address already in use"
    assert await refused(UnixAddress(str(path))) == text
    assert path.read_text() == "data"


@pytest.mark.parametrize("is_tight", [True, False])
async def test_abstract_unix(is_tight: bool) -> None:
    address = UnixAddress(f"migrationd-{os.getpid()}", is_abstract=True, is_tight=is_tight)
    listener = await listen(address, no_fds)
    assert listener.addresses == (address,)
    await passes(listener, address)
    listener.close()


@pytest.mark.skipif(not Path("/dev/vsock").exists(), reason="this host has no vsock")
async def test_vsock() -> None:
    port = 50_000 + os.getpid() % 10_000
    listener = await opened(f"vsock:4294967295:{port}")
    assert listener.addresses == (VsockAddress("4294967295", str(port)),)
    assert listener.qapi_addresses() == [{"type": "vsock", "cid": "4294967295", "port": str(port)}]
    assert await refused(VsockAddress("4294967295", str(port))) == (
        "Failed to bind socket: Address already in use"
    )
    listener.close()


async def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"headstream")
    listener = await listen(FileAddress(str(tmp_path / "f"), 4), no_fds)
    assert listener.addresses == ()
    channel = await listener.accept()
    assert channel.recv_some(100) == b"stream"
    assert channel.recv_some(100) == b""
    with pytest.raises(ConnectFailed, match="no further connection can come"):
        await listener.accept()
    listener.close()
    channel.close()


async def test_an_offset_that_no_file_has(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert await refused(FileAddress(str(tmp_path / "f"), 1 << 63)) == (
        f"Could not open '{tmp_path}/f': offset out of range"
    )


async def test_a_fifo_waits_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    listener = await listen(FileAddress(str(tmp_path / "f")), no_fds)
    channel = await listener.accept()
    view = memoryview(bytearray(9))
    with pytest.raises(TimeoutError):
        channel.recv_into(view, 0.01)
    write_fd = os.open(tmp_path / "f", os.O_WRONLY)
    os.write(write_fd, b"abc")
    assert channel.recv_into(view, 5.0) == 3
    os.close(write_fd)
    assert channel.recv_into(view, 5.0) == 0
    channel.close()
    listener.close()


async def test_a_command() -> None:
    listener = await opened("exec:printf stream")
    channel = await listener.accept()
    assert channel.recv_into(memoryview(bytearray(99)), 5.0) == 6
    channel.close()
    listener.close()


async def test_a_command_that_nobody_takes_is_ended() -> None:
    listener = await opened("exec:sleep 600")
    listener.close()


async def test_passed_descriptors() -> None:
    for ours, theirs in (tcp_pair(), unix_pair()):
        listener = await listen(FdAddress("m"), {"m": ours.detach()}.__getitem__)
        channel = await listener.accept()
        theirs.sendall(b"x")
        assert channel.recv_into(memoryview(bytearray(9)), 5.0) == 1
        channel.close()
        listener.close()
        theirs.close()
    read_fd, write_fd = os.pipe()
    listener = await listen(FdAddress("m"), lambda _: read_fd)
    channel = await listener.accept()
    os.close(write_fd)
    assert channel.recv_into(memoryview(bytearray(9)), 5.0) == 0
    channel.close()
    listener.close()


async def test_a_passed_socket_that_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    listener = await listen(FdAddress("m"), lambda _: server.detach())
    await passes(listener, UnixAddress(path))
    listener.close()
    # It belongs to who made it.
    assert os.path.exists(path)


async def test_a_passed_file_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDONLY | os.O_CREAT)
    with pytest.raises(MigrationdError, match=r"^fd: migration to a file is not supported"):
        await listen(FdAddress("f"), lambda _: fd)


async def test_many_sources_one_after_the_other() -> None:
    listener = await opened("tcp:127.0.0.1:0")
    sources = [await connect(inet(listener)) for _ in range(20)]
    accepted = [await listener.accept() for _ in range(20)]
    for channel in sources + accepted:
        channel.close()
    listener.close()


async def test_an_accepted_connection_takes_the_options() -> None:
    listener = await opened("tcp:127.0.0.1:0,keep-alive=on,keep-alive-interval=9")
    source = await connect(inet(listener))
    channel = await listener.accept()
    assert channel._socket is not None
    assert channel._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert channel._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 9
    for used in (source, channel, listener):
        used.close()


async def test_cancel_while_waiting_for_a_source() -> None:
    listener = await opened("tcp:127.0.0.1:0")
    task = asyncio.create_task(listener.accept())
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await passes(listener, inet(listener))
    listener.close()


async def test_cancel_with_a_source_at_the_door() -> None:
    """The connection is not lost: the next accept has it."""
    listener = await opened("tcp:127.0.0.1:0")
    task = asyncio.create_task(listener.accept())
    await asyncio.sleep(0.005)
    source = await connect(inet(listener))
    task.cancel()
    if not await asyncio.gather(task, return_exceptions=True):
        raise AssertionError
    if task.cancelled():
        channel = await asyncio.wait_for(listener.accept(), 5)
    else:
        channel = task.result()
    for used in (source, channel, listener):
        used.close()


async def test_close_ends_a_connection_whose_handshake_has_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "in.sock"
    listener = await opened(f"unix:{path}")

    async def secure(channel: Channel) -> Channel:
        return channel

    listener.secure = secure
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for sock in (first, second):
            sock.connect(str(path))
            sock.setblocking(False)
        channel = await listener.accept()
        listener.close()
        end = asyncio.get_running_loop().sock_recv(second, 1)
        assert await asyncio.wait_for(end, 5) == b""
        channel.close()


async def test_close_ends_a_waiting_accept() -> None:
    listener = await opened("tcp:127.0.0.1:0")
    task = asyncio.create_task(listener.accept())
    await asyncio.sleep(0.005)
    listener.close()
    with pytest.raises(ConnectFailed, match="no further connection can come"):
        await task


async def test_a_source_that_left_before_it_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = await opened("tcp:127.0.0.1:0")
    real, calls = socket.socket.accept, []

    def accept(sock: socket.socket) -> tuple[socket.socket, object]:
        calls.append(sock)
        if len(calls) == 1:
            raise ConnectionAbortedError(103, "Software caused connection abort")
        if len(calls) > 2:
            raise OSError(24, "Too many open files")
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    source = await connect(inet(listener))
    channel = await listener.accept()
    source.close()
    channel.close()
    with pytest.raises(ConnectFailed, match=r"^Unable to accept connection: Too many open files$"):
        await listener.accept()
    listener.close()


def test_under_uvloop(tmp_path: Path) -> None:
    async def run() -> None:
        for uri in ("tcp:127.0.0.1:0", f"unix:{tmp_path}/s"):
            listener = await opened(uri)
            for _ in range(3):
                await passes(listener, listener.addresses[0])
            task = asyncio.create_task(listener.accept())
            await asyncio.sleep(0.005)
            listener.close()
            with pytest.raises(ConnectFailed):
                await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())

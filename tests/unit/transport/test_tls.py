import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from migrationd.errors import ChannelClosed, ConnectFailed, MigrationdError
from migrationd.linux.iovec import page_vector
from migrationd.objects.registry import ObjectRegistry
from migrationd.transport.address import UnixAddress
from migrationd.transport.channel import Channel
from migrationd.transport.listen import listen
from migrationd.transport.tls import TlsChannel, start_tls_client, start_tls_server
from tests.support.certificates import make_directory

PAGE = 4096


@pytest.fixture(autouse=True)
async def no_thread_left() -> AsyncIterator[None]:
    yield
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ObjectRegistry:
    directory = str(make_directory(tmp_path_factory.mktemp("pki")))
    made = ObjectRegistry()
    made.add("tls-creds-x509", "client", {"dir": directory})
    made.add("tls-creds-x509", "server", {"dir": directory, "endpoint": "server"})
    return made


@pytest.fixture
async def ends(registry: ObjectRegistry) -> AsyncIterator[tuple[TlsChannel, TlsChannel]]:
    """A client and a server that have shaken hands."""
    one, other = socket.socketpair()
    client, server = await asyncio.gather(
        start_tls_client(
            Channel(one.detach()), registry.tls_client("client", None), "localhost", "here"
        ),
        start_tls_server(Channel(other.detach()), registry.tls_server("server", None), "there"),
    )
    yield client, server
    client.close()
    server.close()


def read_all(channel: Channel, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        count = channel.recv_into(view[done:], 5)
        assert count
        done += count
    return bytes(data)


async def test_pages_and_vectors_arrive_as_they_were(ends: tuple[TlsChannel, TlsChannel]) -> None:
    client, server = ends
    generator = np.random.default_rng(7)
    memory = generator.integers(0, 256, 300 * PAGE, np.uint8)
    pages = generator.permutation(300)[:200].astype(np.int64)
    headers = generator.integers(0, 256, (200, 8), np.uint8)
    body = b"".join(
        headers[i].tobytes() + memory[p * PAGE : (p + 1) * PAGE].tobytes()
        for i, p in enumerate(pages)
    )
    run = np.array([[memory.ctypes.data + i * PAGE, PAGE] for i in range(100)], np.uint64)

    def send() -> None:
        assert client.send_pages(b"prefix", headers, memory, pages, PAGE) == 6 + len(body)
        assert client.send_vector(page_vector(headers, memory, pages, PAGE)) == len(body)
        assert client.send_vector(run) == 100 * PAGE
        assert client.send_window(run, run.ctypes.data, 100 * PAGE) == 100 * PAGE
        assert client.send_parts((b"a", memoryview(b"bc"))) == 3
        assert client.bytes_sent == 9 + 2 * len(body) + 200 * PAGE

    sender = threading.Thread(target=send)
    sender.start()
    assert await asyncio.to_thread(read_all, server, 6 + len(body)) == b"prefix" + body
    received = np.zeros(300 * PAGE, np.uint8)
    got = np.zeros((200, 8), np.uint8)
    vector = page_vector(got, received, pages, PAGE)
    assert await asyncio.to_thread(server.recv_exactly, vector, len(body)) == len(body)
    assert (got == headers).all()
    for page in pages:
        part = slice(int(page) * PAGE, int(page + 1) * PAGE)
        assert (received[part] == memory[part]).all()
    expected = memory[: 100 * PAGE].tobytes() * 2
    assert await asyncio.to_thread(read_all, server, 200 * PAGE) == expected
    assert await asyncio.to_thread(read_all, server, 3) == b"abc"
    sender.join()


def test_nothing_of_a_channel_goes_past_the_encryption() -> None:
    touching = ("send", "recv", "peek", "on_fd", "descriptor")
    names = {name for name in vars(Channel) if name.startswith(touching)}
    assert len(names) > 10
    assert names <= set(vars(TlsChannel))


async def test_both_ways_at_once(ends: tuple[TlsChannel, TlsChannel]) -> None:
    client, server = ends
    data = bytes(range(256)) * 4096
    results = await asyncio.gather(
        asyncio.to_thread(client.send, data),
        asyncio.to_thread(server.send, data),
        asyncio.to_thread(read_all, server, len(data)),
        asyncio.to_thread(read_all, client, len(data)),
    )
    assert results[2:] == [data, data]


async def test_looking_takes_nothing(ends: tuple[TlsChannel, TlsChannel]) -> None:
    client, server = ends
    with pytest.raises(BlockingIOError):
        server.peek(4)
    client.send(b"QEVM and the rest")
    await server.wait_readable(5)
    assert server.peek(4) == b"QEVM"
    assert await server.wait_readable(0)
    assert read_all(server, 17) == b"QEVM and the rest"
    assert not await server.wait_readable(0.01)


async def test_what_was_taken_in_part_is_not_waited_for(
    ends: tuple[TlsChannel, TlsChannel],
) -> None:
    """The rest of it is here already, and nothing may ever follow."""
    client, server = ends
    client.send(b"QEVM and the rest")
    await server.wait_readable(5)
    assert server.peek(4) == b"QEVM"
    data = b""
    while len(data) < 17:
        assert await server.wait_readable(5)
        data += server.recv_some(17 - len(data))
    assert data == b"QEVM and the rest"
    assert not await server.wait_readable(0.01)
    assert not await server.wait_readable(0.01)


async def test_a_goodbye_reads_as_the_end(
    ends: tuple[TlsChannel, TlsChannel],
) -> None:
    client, server = ends
    client.send(b"last")
    client.close()
    assert read_all(server, 4) == b"last"
    assert server.recv_some(10) == b""
    assert server.recv_into(memoryview(bytearray(4)), 1) == 0


async def test_a_connection_that_breaks_reads_as_the_end(
    ends: tuple[TlsChannel, TlsChannel],
) -> None:
    client, server = ends
    client.send(b"last")
    Channel(client.detach()).close()
    assert read_all(server, 4) == b"last"
    assert server.recv_into(memoryview(bytearray(4)), 1) == 0
    assert server.recv_some(4) == b""


async def test_a_shutdown_ends_what_blocks(ends: tuple[TlsChannel, TlsChannel]) -> None:
    client, _ = ends
    reading = asyncio.ensure_future(asyncio.to_thread(read_all, client, 4))
    sending = asyncio.ensure_future(asyncio.to_thread(client.send, bytes(32 << 20)))
    await asyncio.wait({reading, sending}, timeout=0.05)
    assert not reading.done()
    assert not sending.done()
    client.shutdown()
    for task in (reading, sending):
        with pytest.raises(ChannelClosed, match="the channel was shut down"):
            await asyncio.wait_for(task, 5)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"QEVM\0\0\0\3", "the peer does not speak TLS; set tls-creds at both ends"),
        (b"", "the peer closed the connection"),
        (None, "the peer said nothing for 0.05 s"),
    ],
)
async def test_a_peer_without_tls_is_told_apart(
    registry: ObjectRegistry,
    said: bytes | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = socket.socketpair()
    if said is None:
        monkeypatch.setattr(TlsChannel.handshake, "__defaults__", (0.05,))
    else:
        other.sendall(said)
        other.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectFailed) as caught:
        await start_tls_server(Channel(one.detach()), registry.tls_server("server", None), "peer")
    assert str(caught.value) == f"TLS handshake failed with peer: {expected}"
    other.close()


async def test_without_a_name_to_check_nothing_is_sent(registry: ObjectRegistry) -> None:
    one, other = socket.socketpair()
    with pytest.raises(ConnectFailed, match=r"has no host name .* set tls-hostname"):
        await start_tls_client(
            Channel(one.detach()), registry.tls_client("client", None), None, "x"
        )
    assert other.recv(1) == b""
    other.close()


async def test_a_silent_connection_does_not_keep_others_out(
    registry: ObjectRegistry, tmp_path: Path
) -> None:
    def no_fd(name: str) -> int:
        raise MigrationdError(name)

    address = UnixAddress(str(tmp_path / "s"))
    listener = await listen(address, no_fd)

    async def secure(channel: Channel) -> Channel:
        return await start_tls_server(channel, registry.tls_server("server", None), "peer")

    listener.secure = secure
    silent, wrong, right = (socket.socket(socket.AF_UNIX) for _ in range(3))
    accepting = asyncio.create_task(listener.accept())
    for sock in (silent, wrong, right):
        sock.connect(address.path)
    wrong.sendall(b"GET / HTTP/1.0\r\n\r\n")
    client = await start_tls_client(
        Channel(right.detach()), registry.tls_client("client", None), "localhost", "x"
    )
    server = await asyncio.wait_for(accepting, 5)
    client.send(b"hello")
    assert await asyncio.to_thread(read_all, server, 5) == b"hello"
    listener.close()
    await asyncio.sleep(0)
    for end in (client, server, silent, wrong):
        end.close()
    await asyncio.sleep(0.05)

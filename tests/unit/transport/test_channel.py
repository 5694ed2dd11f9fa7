import asyncio
import ctypes
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from migrationd.errors import ChannelClosed, ConnectFailed
from migrationd.linux import iovec
from migrationd.transport import channel as channel_module
from migrationd.transport.channel import Channel
from tests.unit.transport.support import (
    in_thread,
    pipe_channel_to_write,
    read_all,
    tcp_pair,
    unix_pair,
    wait_for,
)

PAGE = 64
WAKE_S = 2.0
"""A wake-up takes 0.1 ms, and a busy machine a second; nobody else wakes what stands still."""

Bytes = npt.NDArray[np.uint8]
SocketPair = Callable[[], tuple[socket.socket, socket.socket]]
pairs = pytest.mark.parametrize("make_pair", [tcp_pair, unix_pair])


def channel_of(sock: socket.socket) -> Channel:
    return Channel(sock.detach())


def pages_to_send(count: int) -> tuple[Bytes, Bytes, npt.NDArray[np.int64], bytes]:
    rng = np.random.default_rng(count)
    memory = rng.integers(0, 256, (count + 3) * PAGE, dtype=np.uint8)
    headers = rng.integers(0, 256, (count, 8), dtype=np.uint8)
    pages = rng.permutation(count + 3)[:count].astype(np.int64)
    rows = memory.reshape(-1, PAGE)
    whole = b"".join(headers[i].tobytes() + rows[pages[i]].tobytes() for i in range(count))
    return headers, memory, pages, whole


@pairs
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 2000])
def test_pages_arrive_in_order(make_pair: SocketPair, count: int) -> None:
    ours, theirs = make_pair()
    channel = channel_of(ours)
    headers, memory, pages, whole = pages_to_send(count)
    with theirs:
        received = in_thread(lambda: read_all(theirs.fileno()))
        assert channel.send_pages(b"prefix", headers, memory, pages, PAGE) == 6 + len(whole)
        assert channel.send_pages(b"", headers, memory, pages, PAGE) == len(whole)
        channel.finish()
        assert channel.bytes_sent == 6 + 2 * len(whole)
        channel.close()
        assert received.result() == b"prefix" + whole + whole


def test_pages_through_a_small_pipe() -> None:
    channel, read_fd = pipe_channel_to_write()
    fcntl.fcntl(read_fd, fcntl.F_SETPIPE_SZ, 4096)
    headers, memory, pages, whole = pages_to_send(700)
    sent = in_thread(lambda: channel.send_pages(b"x", headers, memory, pages, PAGE))
    received = bytearray()
    step = 1
    while len(received) < len(whole) + 1:
        received += os.read(read_fd, step)
        step = step % 997 + 1
    assert sent.result() == len(whole) + 1
    assert bytes(received) == b"x" + whole
    channel.close()
    os.close(read_fd)


def test_short_writes_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = bytearray()
    lengths = list(range(1, 2 * (8 + PAGE) + 2))

    def short(fd: int, vector: iovec.Vector) -> int:
        assert len(vector) <= iovec.IOV_MAX
        most = left = lengths[-1]
        for address, length in vector.tolist():
            take = min(left, length)
            taken.extend(ctypes.string_at(address, take))
            left -= take
        return most - left

    ours, theirs = unix_pair()
    channel = channel_of(ours)
    monkeypatch.setattr(channel_module, "send_vector", short)
    headers, memory, pages, whole = pages_to_send(8)
    while lengths:
        taken.clear()
        assert channel.send_pages(b"ab", headers, memory, pages, PAGE) == len(whole) + 2
        assert bytes(taken) == b"ab" + whole
        lengths.pop()
    channel.close()
    theirs.close()


def test_an_interrupted_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(fd: int, vector: iovec.Vector) -> int:
        calls.append(fd)
        if len(calls) == 1:
            raise InterruptedError
        return iovec.send_vector(fd, vector)

    ours, theirs = unix_pair()
    channel = channel_of(ours)
    monkeypatch.setattr(channel_module, "send_vector", interrupted)
    channel.send(b"data")
    assert theirs.recv(10) == b"data"
    assert len(calls) == 2
    channel.close()
    theirs.close()


def test_sending_nothing() -> None:
    ours, theirs = unix_pair()
    channel = channel_of(ours)
    theirs.close()
    channel.send(b"")
    channel.close()


@pairs
def test_receiving(make_pair: SocketPair) -> None:
    ours, theirs = make_pair()
    channel = channel_of(ours)
    view = memoryview(bytearray(10))
    with pytest.raises(TimeoutError):
        channel.recv_into(view, 0.0)
    theirs.sendall(b"hello")
    assert channel.recv_into(view, None) == 5
    assert view[:5] == b"hello"
    with pytest.raises(BlockingIOError):
        channel.recv_some(10)
    theirs.sendall(b"0123456789ab")
    assert channel.recv_into(view, 1.0) == 10
    assert channel.recv_some(10) == b"ab"
    assert channel.bytes_received == 17
    theirs.close()
    assert channel.recv_into(view, None) == 0
    assert channel.recv_some(10) == b""
    channel.close()


def test_kinds(tmp_path: Path) -> None:
    ours, theirs = unix_pair()
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    pipe, read_fd = pipe_channel_to_write()
    for channel, kind in (
        (channel_of(ours), (True, True, False)),
        (Channel(fd), (False, False, True)),
        (pipe, (False, False, False)),
    ):
        assert (channel.is_socket, channel.is_duplex, channel.is_seekable) == kind
        channel.close()
    theirs.close()
    os.close(read_fd)


def test_the_descriptor_is_not_inherited() -> None:
    ours, theirs = unix_pair()
    ours.set_inheritable(True)
    fd = ours.fileno()
    channel = channel_of(ours)
    assert not os.get_inheritable(fd)
    channel.close()
    theirs.close()


def test_a_bad_descriptor_leaves_nothing() -> None:
    with pytest.raises(ConnectFailed, match="Bad file descriptor"):
        Channel(1 << 20)


def test_the_peer_is_gone() -> None:
    ours, theirs = unix_pair()
    channel = channel_of(ours)
    theirs.close()
    with pytest.raises(ChannelClosed, match=r"^Unable to write to socket: Broken pipe$") as caught:
        channel.send(b"x")
    assert isinstance(caught.value.__cause__, BrokenPipeError)
    channel.close()


def test_the_peer_resets() -> None:
    ours, theirs = tcp_pair()
    channel = channel_of(ours)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()
    text = "^Unable to read from socket: Connection reset by peer$"
    with pytest.raises(ChannelClosed, match=text):
        channel.recv_into(memoryview(bytearray(1)), 5.0)
    channel.close()


def test_a_broken_pipe_of_a_file() -> None:
    channel, read_fd = pipe_channel_to_write()
    os.close(read_fd)
    with pytest.raises(ChannelClosed, match=r"^Unable to write to file: Broken pipe$"):
        channel.send(b"x")
    channel.close()


def test_a_full_device() -> None:
    channel = Channel(os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(ChannelClosed, match=r"^Unable to write to file: No space left on device$"):
        channel.send(b"x")
    channel.close()


def stalled_channels() -> list[Callable[[], tuple[Channel, Callable[[], None]]]]:
    def over(make_pair: SocketPair) -> Callable[[], tuple[Channel, Callable[[], None]]]:
        def make() -> tuple[Channel, Callable[[], None]]:
            ours, theirs = make_pair()
            return channel_of(ours), theirs.close

        return make

    def over_pipe() -> tuple[Channel, Callable[[], None]]:
        channel, read_fd = pipe_channel_to_write()
        return channel, lambda: os.close(read_fd)

    return [over(tcp_pair), over(unix_pair), over_pipe]


stalled = pytest.mark.parametrize("make", stalled_channels(), ids=["tcp", "unix", "pipe"])


@stalled
def test_shutdown_wakes_a_writer_whose_peer_stopped_reading(
    make: Callable[[], tuple[Channel, Callable[[], None]]],
) -> None:
    channel, close_peer = make()
    block = bytes(1 << 20)

    def write_on() -> None:
        while True:
            channel.send(block)

    def write() -> float:
        with pytest.raises(ChannelClosed, match=r"^the channel was shut down$"):
            write_on()
        return time.monotonic()

    writer = in_thread(write)
    wait_for(lambda: channel.bytes_sent > 0 or channel.is_socket)
    time.sleep(0.05)
    assert not writer.done()
    before = time.monotonic()
    channel.shutdown()
    assert writer.result(20) - before < WAKE_S
    channel.close()
    close_peer()


@pairs
def test_shutdown_wakes_a_reader(make_pair: SocketPair) -> None:
    ours, theirs = make_pair()
    channel = channel_of(ours)

    def read() -> float:
        with pytest.raises(ChannelClosed, match="shut down"):
            channel.recv_into(memoryview(bytearray(1)), None)
        return time.monotonic()

    reader = in_thread(read)
    time.sleep(0.02)
    before = time.monotonic()
    channel.shutdown()
    assert reader.result(20) - before < WAKE_S
    channel.close()
    theirs.close()


def test_shutdown_wakes_a_reader_of_a_pipe() -> None:
    read_fd, write_fd = os.pipe()
    channel = Channel(read_fd)
    reader = in_thread(lambda: channel.recv_into(memoryview(bytearray(1)), None))
    time.sleep(0.02)
    channel.shutdown()
    assert isinstance(reader.exception(5), ChannelClosed)
    channel.close()
    os.close(write_fd)


@pairs
def test_after_shutdown_every_call_fails(make_pair: SocketPair) -> None:
    ours, theirs = make_pair()
    theirs.sendall(b"waiting")
    channel = channel_of(ours)
    channel.shutdown()
    channel.shutdown()
    for call in (
        lambda: channel.recv_into(memoryview(bytearray(1)), None),
        lambda: channel.recv_some(1),
        lambda: channel.send(b"x"),
        channel.finish,
    ):
        with pytest.raises(ChannelClosed, match=r"^the channel was shut down$"):
            call()
    channel.close()
    channel.close()
    channel.shutdown()
    theirs.close()


def test_close_under_a_blocked_call_frees_the_descriptor_at_its_end() -> None:
    ours, theirs = unix_pair()
    fd = ours.fileno()
    channel = channel_of(ours)
    reader = in_thread(lambda: channel.recv_into(memoryview(bytearray(1)), None))
    time.sleep(0.02)
    channel.close()
    assert isinstance(reader.exception(5), ChannelClosed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    theirs.close()


def test_close_leaves_sent_bytes_to_the_peer() -> None:
    for make_pair in (tcp_pair, unix_pair):
        ours, theirs = make_pair()
        channel = channel_of(ours)
        channel.send(b"z" * 100_000)
        channel.close()
        assert read_all(theirs.fileno()) == b"z" * 100_000
        theirs.close()


@pairs
async def test_waiting_on_the_loop(make_pair: SocketPair) -> None:
    ours, theirs = make_pair()
    channel = channel_of(ours)
    assert not await channel.wait_readable(0.001)
    asyncio.get_running_loop().call_later(0.005, theirs.sendall, b"x")
    assert await channel.wait_readable()
    assert channel.recv_some(10) == b"x"
    theirs.close()
    assert await channel.wait_readable(1.0)
    assert channel.recv_some(10) == b""
    channel.close()


async def test_shutdown_ends_a_wait_on_the_loop() -> None:
    ours, theirs = unix_pair()
    channel = channel_of(ours)
    waiting = asyncio.create_task(channel.wait_readable())
    await asyncio.sleep(0)
    channel.shutdown()
    with pytest.raises(ChannelClosed):
        await waiting
    with pytest.raises(ChannelClosed):
        await channel.wait_readable()
    channel.close()
    theirs.close()


async def test_close_ends_a_wait_on_the_loop() -> None:
    ours, theirs = unix_pair()
    channel = channel_of(ours)
    waiting = asyncio.create_task(channel.wait_readable())
    await asyncio.sleep(0)
    channel.close()
    with pytest.raises(ChannelClosed):
        await waiting
    theirs.close()


async def test_a_cancelled_wait_leaves_no_watch() -> None:
    ours, theirs = unix_pair()
    channel = channel_of(ours)
    waiting = asyncio.create_task(channel.wait_readable())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    theirs.sendall(b"x")
    assert await channel.wait_readable(1.0)
    channel.close()
    theirs.close()


async def test_a_file_is_always_readable(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    channel = Channel(os.open(tmp_path / "f", os.O_RDONLY))
    assert await channel.wait_readable()
    assert channel.recv_some(2) == b"ab"
    assert channel.recv_into(memoryview(bytearray(9)), None) == 1
    assert channel.recv_into(memoryview(bytearray(9)), None) == 0
    channel.close()


def test_finish_stores_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for is_durable in (False, True):
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
        channel = Channel(fd, is_durable=is_durable)
        channel.send(b"abc")
        channel.finish()
        assert synced == [fd] * is_durable
        channel.close()
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_finish_reports_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    channel = Channel(os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT), is_durable=True)
    with pytest.raises(ChannelClosed, match=r"^Unable to write to file: Input/output error$"):
        channel.finish()
    channel.close()


def test_a_send_timeout_set_by_somebody_else_is_no_error() -> None:
    ours, theirs = unix_pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, b"\0" * 8 + b"\x88\x13" + b"\0" * 6)
    channel = channel_of(ours)
    sent = in_thread(lambda: channel.send(bytes(4 << 20)))
    time.sleep(0.05)
    assert not sent.done()
    received = in_thread(lambda: read_all(theirs.fileno()))
    assert sent.result(5) is None
    channel.close()
    assert len(received.result()) == 4 << 20
    theirs.close()


def test_gathered_bytes_come_at_once_and_later_ones_one_by_one() -> None:
    ours, theirs = tcp_pair()
    channel = channel_of(ours)
    view = memoryview(bytearray(2000))
    with theirs:
        theirs.sendall(bytes(100))
        assert not channel.gather(1000), "100 bytes are not 1,000"
        assert channel.recv_into(view, WAKE_S) == 100, "and nobody waits for more than one then"
        theirs.sendall(bytes(1000))
        wait_for(lambda: channel.gather(1000))
        assert channel.recv_into(view, WAKE_S) == 1000
        assert ours_low_water(channel) == 1000
        channel.gather_no_more()
        theirs.sendall(b"x")
        assert channel.recv_into(view, WAKE_S) == 1
        theirs.shutdown(socket.SHUT_WR)
        wait_for(lambda: channel.gather(1000))
        assert channel.recv_into(view, WAKE_S) == 0, "the end is worth a look, too"
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.gather(1000)


def ours_low_water(channel: Channel) -> int:
    with channel.descriptor() as fd, socket.socket(fileno=os.dup(fd)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


@pairs
@pytest.mark.parametrize("step", [1, 700, 5000])
def test_a_window_is_filled_in_any_pieces(make_pair: SocketPair, step: int) -> None:
    ours, theirs = make_pair()
    channel = channel_of(ours)
    data = np.random.default_rng(step).integers(0, 256, 5000, dtype=np.uint8)
    target = np.zeros(5000, np.uint8)
    at = iovec.address_of(target)
    window = iovec.Window((at + 4000, 1000))
    window.aim(at, 4000)
    before = window.vector()
    with theirs, channel.held():
        received = in_thread(lambda: channel.recv_window(window, 5000))
        for begin in range(0, 5000, step):
            theirs.sendall(data[begin : begin + step])
        assert received.result(WAKE_S * 10) == 5000
        np.testing.assert_array_equal(target, data)
        np.testing.assert_array_equal(window.vector(), before)
        theirs.sendall(data[:4100])
        theirs.shutdown(socket.SHUT_WR)
        assert channel.recv_window(window, 5000) == 4100
        assert channel.recv_window(window, 5000) == 0
    assert channel.bytes_received == 9100
    channel.close()

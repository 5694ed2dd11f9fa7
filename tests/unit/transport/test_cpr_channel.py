"""Descriptors over the cpr channel."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from migrationd.errors import AddressError, ChannelClosed, ConnectFailed
from migrationd.transport import cpr_channel
from migrationd.transport.address import InetAddress, UnixAddress
from migrationd.transport.cpr_channel import CprSender, listen_cpr
from tests.support.descriptors import open_count


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "cpr"))


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


async def test_descriptors_arrive_in_order_and_the_source_waits(address: UnixAddress) -> None:
    listener = await listen_cpr(address)
    fds = [memfd(b"%d" % number) for number in range(40)]
    pieces = [b"head", *[b"x" * 500] * 39, b"tail"]
    handing = asyncio.create_task(CprSender(address).hand_over(pieces, fds))
    data, received = await listener.receive(1 << 20, 64)
    assert data == b" ".join(pieces)
    assert [os.pread(fd, 9, 0) for fd in received] == [b"%d" % number for number in range(40)]
    assert not any(os.get_inheritable(fd) for fd in received)
    await asyncio.sleep(0.05)
    assert not handing.done()
    listener.release()
    await asyncio.wait_for(handing, 5)
    for fd in (*fds, *received):
        os.close(fd)
    listener.close()
    assert not os.path.exists(address.path)


async def test_one_source_after_the_other(address: UnixAddress) -> None:
    listener = await listen_cpr(address)
    for text in (b"first", b"second"):
        handing = asyncio.create_task(CprSender(address).hand_over([text], []))
        assert (await listener.receive(100, 0))[0] == text
        listener.release()
        await asyncio.wait_for(handing, 5)
    listener.close()


@pytest.mark.parametrize(("limit_bytes", "limit_fds"), [(10, 9), (1 << 20, 1)])
async def test_too_much_is_refused_and_nothing_stays_open(
    address: UnixAddress, limit_bytes: int, limit_fds: int
) -> None:
    listener = await listen_cpr(address)
    fds = [memfd(b"a"), memfd(b"b")]
    before = open_count()
    handing = asyncio.create_task(CprSender(address).hand_over([b"h" * 20, b"", b"t" * 20], fds))
    with pytest.raises(ChannelClosed, match="more than"):
        await listener.receive(limit_bytes, limit_fds)
    listener.release()
    await asyncio.wait([handing], timeout=5)
    assert handing.done()
    handing.exception()
    for fd in fds:
        os.close(fd)
    assert open_count() == before - 2
    listener.close()


async def test_a_source_that_says_nothing_is_given_up(
    address: UnixAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpr_channel, "STATE_WAIT_S", 0.05)
    listener = await listen_cpr(address)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(address.path)
        with pytest.raises(ChannelClosed, match="in time"):
            await listener.receive(100, 1)
    listener.close()


async def test_a_destination_that_goes_is_noticed(address: UnixAddress) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address.path)
        door.listen()
        sender = CprSender(address)
        handing = asyncio.create_task(sender.hand_over([b"x" * (8 << 20)], []))
        await asyncio.sleep(0.05)
        door.accept()[0].close()
        with pytest.raises(ChannelClosed, match="did not take"):
            await asyncio.wait_for(handing, 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_another_user_is_not_let_in() -> None:
    address = UnixAddress(f"cpr-{os.getpid()}", is_abstract=True)
    listener = await listen_cpr(address)
    os.seteuid(65534)
    try:
        sender = CprSender(address)
    finally:
        os.seteuid(0)
    receiving = asyncio.create_task(listener.receive(100, 1))
    await asyncio.wait_for(sender.hand_over([b""], []), 5)
    assert not receiving.done()
    handing = asyncio.create_task(CprSender(address).hand_over([b"mine"], []))
    assert (await asyncio.wait_for(receiving, 5))[0] == b"mine"
    listener.close()
    await handing


async def test_addresses_that_cannot_serve(address: UnixAddress) -> None:
    elsewhere = InetAddress("127.0.0.1", "1")
    with pytest.raises(AddressError, match="bad cpr channel address; must be unix"):
        CprSender(elsewhere)
    with pytest.raises(AddressError, match="bad cpr channel address; must be unix"):
        await listen_cpr(elsewhere)
    with pytest.raises(ConnectFailed, match=f"Failed to connect to '{address.path}': No such"):
        CprSender(address)

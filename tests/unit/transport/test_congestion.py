import socket

import pytest

from migrationd.transport.address import parse_uri
from migrationd.transport.congestion import is_on_this_host, use_no_pacing_on_this_host
from migrationd.transport.connect import connect


def control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


async def test_a_connection_on_this_host_is_not_paced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = await connect(parse_uri(f"tcp:127.0.0.1:{server.getsockname()[1]}"))
        assert channel._socket is not None
        assert control(channel._socket) == b"reno"
        channel.close()


def test_others_keep_what_the_system_uses() -> None:
    with socket.socket() as sock:
        before = control(sock)
        use_no_pacing_on_this_host(sock, ("192.0.2.1", 1))
        assert control(sock) == before


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3"])
def test_loopback_is_this_host(host: str) -> None:
    assert is_on_this_host(socket.AF_INET, (host, 1))


def test_an_address_of_an_interface_is_this_host() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
        except OSError:
            pytest.skip("this host has no address but loopback")
        own = probe.getsockname()[0]
    assert is_on_this_host(socket.AF_INET, (own, 1))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_ipv6() -> None:
    assert is_on_this_host(socket.AF_INET6, ("::1", 1, 0, 0))
    assert not is_on_this_host(socket.AF_INET6, ("2001:db8::1", 1, 0, 0))


def test_a_network_is_not() -> None:
    assert not is_on_this_host(socket.AF_INET, ("192.0.2.1", 1))

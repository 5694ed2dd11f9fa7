import pytest

from migrationd.errors import AddressError
from migrationd.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    InetAddress,
    RdmaAddress,
    UnixAddress,
    VsockAddress,
    address_from_qapi,
    describe,
    parse_uri,
    socket_address_to_qapi,
    unix_target,
)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:127.0.0.1:4444", InetAddress("127.0.0.1", "4444")),
        ("tcp:host.example:migration", InetAddress("host.example", "migration")),
        ("tcp::1", InetAddress("", "1")),
        ("tcp:0:0", InetAddress("0", "0")),
        ("tcp:[::1]:1", InetAddress("::1", "1")),
        ("tcp:[fe80::1%eth0]:1", InetAddress("fe80::1%eth0", "1")),
        ("tcp:a:b:c", InetAddress("a", "b:c")),
        ("tcp:127.0.0.1:99999", InetAddress("127.0.0.1", "99999")),
        ("tcp:127.0.0.1:1,", InetAddress("127.0.0.1", "1")),
        ("tcp:addr=h:1", InetAddress("h", "1")),
        ("tcp:h:1,to=9", InetAddress("h", "1", to=9)),
        ("tcp:h:1,to=70000", InetAddress("h", "1", to=70000)),
        ("tcp:h:1,to=0x10", InetAddress("h", "1", to=16)),
        ("tcp:h:1,ipv4", InetAddress("h", "1", ipv4=True)),
        ("tcp:h:1,noipv4", InetAddress("h", "1", ipv4=False)),
        ("tcp:h:1,ipv4=yes,ipv6=off", InetAddress("h", "1", ipv4=True, ipv6=False)),
        ("tcp:h:1,ipv4=on,ipv4=off", InetAddress("h", "1", ipv4=False)),
        ("tcp:h:1,numeric=on,mptcp", InetAddress("h", "1", mptcp=True)),
        (
            "tcp:h:1,keep-alive=on,keep-alive-count=3,keep-alive-idle=4,keep-alive-interval=5",
            InetAddress(
                "h",
                "1",
                keep_alive=True,
                keep_alive_count=3,
                keep_alive_idle=4,
                keep_alive_interval=5,
            ),
        ),
        ("unix:/tmp/a,b", UnixAddress("/tmp/a,b")),
        ("vsock:2:1024", VsockAddress("2", "1024")),
        ("vsock:1:2:3", VsockAddress("1", "2:3")),
        ("fd:migrate", FdAddress("migrate")),
        ("exec:", ExecAddress(("/bin/sh", "-c", ""))),
        ("exec:cat >f, 'x:y'", ExecAddress(("/bin/sh", "-c", "cat >f, 'x:y'"))),
        ("file:/a/b", FileAddress("/a/b")),
        ("file:", FileAddress("")),
        ("file:/a,b,offset=0x1000", FileAddress("/a,b", 4096)),
        ("file:/a,offset=4k", FileAddress("/a", 4096)),
        ("rdma:h:1", RdmaAddress("h", "1")),
    ],
)
def test_uris(uri: str, address: Address) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", "unknown migration protocol: "),
        ("tcp", "unknown migration protocol: tcp"),
        ("exec", "unknown migration protocol: exec"),
        ("defer", "unknown migration protocol: defer"),
        ("http://x/", "unknown migration protocol: http://x/"),
        ("UNIX:/tmp/x", "unknown migration protocol: UNIX:/tmp/x"),
        ("x-rdma:h:1", "unknown migration protocol: x-rdma:h:1"),
        ("tcp:", "error parsing address ''"),
        ("tcp:host", "error parsing address 'host'"),
        ("tcp::", "error parsing address ':'"),
        ("tcp:,ipv4=on", "error parsing address ''"),
        ("tcp:[::1", "error parsing IPv6 address '[::1'"),
        ("tcp:[::1]", "error parsing IPv6 address '[::1]'"),
        ("tcp:[]:1", "error parsing IPv6 address '[]:1'"),
        ("tcp:[::1]x:1", "error parsing IPv6 address '[::1]x:1'"),
        ("tcp:h:1,to=x", "Parameter 'to' expects a number"),
        ("tcp:h:1,keep-alive-count=x", "Parameter 'keep-alive-count' expects a number"),
        ("tcp:h:1,ipv4=maybe", "Parameter 'ipv4' expects 'on' or 'off'"),
        ("tcp:h:1,bogus=1", "Invalid parameter 'bogus'"),
        ("tcp:h:1,nobogus", "Invalid parameter 'nobogus'"),
        ("unix:", "invalid Unix socket address"),
        ("fd:", "invalid file descriptor address"),
        ("vsock:", "error parsing address ''"),
        ("vsock:1", "error parsing address '1'"),
        ("vsock:1:", "error parsing address '1:'"),
        ("vsock::1", "error parsing address ':1'"),
        ("vsock:1:2,x", "trailing characters in address '1:2,x'"),
        ("file:/tmp/x,offset=abc", "file URI has bad offset abc: Invalid argument"),
        ("file:/tmp/x,offset=", "file URI has bad offset : Invalid argument"),
        ("file:/x,offset=1K,offset=2", "file URI has bad offset 1K,offset=2: Invalid argument"),
        ("file:/x,offset=-1", "file URI has bad offset -1: Numerical result out of range"),
        ("rdma:h", "error parsing address 'h'"),
        ("unix:/a\0b", "an address cannot contain a NUL character"),
    ],
)
def test_uri_errors(uri: str, text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_uri(uri)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("members", "address"),
    [
        (
            {"transport": "socket", "type": "inet", "host": "h", "port": "1", "keep-alive": True},
            InetAddress("h", "1", keep_alive=True),
        ),
        (
            {"transport": "socket", "type": "inet", "host": "h", "port": "1", "to": 7}
            | {"ipv4": False, "keep-alive-idle": 4},
            InetAddress("h", "1", to=7, ipv4=False, keep_alive_idle=4),
        ),
        ({"transport": "socket", "type": "unix", "path": "/p"}, UnixAddress("/p")),
        (
            {"transport": "socket", "type": "unix", "path": "p", "abstract": True, "tight": False},
            UnixAddress("p", is_abstract=True, is_tight=False),
        ),
        (
            {"transport": "socket", "type": "vsock", "cid": "2", "port": "9"},
            VsockAddress("2", "9"),
        ),
        ({"transport": "socket", "type": "fd", "str": "x"}, FdAddress("x")),
        ({"transport": "exec", "args": ["/bin/cat", "-"]}, ExecAddress(("/bin/cat", "-"))),
        ({"transport": "file", "filename": "/f", "offset": 3}, FileAddress("/f", 3)),
        ({"transport": "rdma", "host": "h", "port": "1"}, RdmaAddress("h", "1")),
    ],
)
def test_qapi_addresses(members: dict[str, object], address: Address) -> None:
    assert address_from_qapi(members) == address


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"transport": "exec", "args": []}, "exec: the list of arguments is empty"),
        ({"transport": "exec", "args": ["a", "b\0"]}, "an address cannot contain a NUL character"),
        (
            {"transport": "file", "filename": "a\0", "offset": 0},
            "an address cannot contain a NUL character",
        ),
    ],
)
def test_qapi_errors(members: dict[str, object], text: str) -> None:
    with pytest.raises(AddressError) as caught:
        address_from_qapi(members)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("address", "members"),
    [
        (
            InetAddress("::", "1"),
            {"type": "inet", "host": "::", "port": "1", "ipv6": True},
        ),
        (
            InetAddress("127.0.0.1", "1"),
            {"type": "inet", "host": "127.0.0.1", "port": "1", "ipv4": True},
        ),
        (UnixAddress("/p"), {"type": "unix", "path": "/p"}),
        (
            UnixAddress("p", is_abstract=True),
            {"type": "unix", "path": "p", "abstract": True, "tight": True},
        ),
        (VsockAddress("2", "9"), {"type": "vsock", "cid": "2", "port": "9"}),
        (FdAddress("x"), {"type": "fd", "str": "fd:x"}),
    ],
)
def test_socket_address_members(address: Address, members: dict[str, object]) -> None:
    assert socket_address_to_qapi(address) == members


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("tcp:[::1]:9", "::1:9"),
        ("unix:/p", "/p"),
        ("vsock:2:9", "2:9"),
        ("fd:x", "fd:x"),
        ("exec:cat", "cat"),
        ("file:/f,offset=1", "/f"),
        ("rdma:h:1", "h:1"),
    ],
)
def test_descriptions(uri: str, text: str) -> None:
    assert describe(parse_uri(uri)) == text


def test_a_unix_path_has_107_bytes() -> None:
    assert unix_target(UnixAddress("p" * 107)) == "p" * 107
    for path in ("p" * 108, "é" * 54):
        with pytest.raises(AddressError, match=f"UNIX socket path '{path}' is too long"):
            unix_target(UnixAddress(path))


def test_an_empty_unix_path_is_refused() -> None:
    with pytest.raises(AddressError, match="invalid Unix socket address"):
        unix_target(UnixAddress(""))


def test_abstract_names() -> None:
    assert unix_target(UnixAddress("n", is_abstract=True)) == b"\0n"
    loose = unix_target(UnixAddress("n", is_abstract=True, is_tight=False))
    assert loose == b"\0n" + bytes(106)

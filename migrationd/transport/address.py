"""Migration addresses: QEMU's URI form, its QAPI form, and plain values.

Reference: grammar and texts of QEMU's ``migrate`` (URI prefixes are case-sensitive).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from migrationd.errors import AddressError

_SIZE = re.compile(r"(0[xX][0-9a-fA-F]{1,16}|\d{1,19})([bBkKmMgGtTpPeE]?)$")
_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_UNIX_PATH_LIMIT = 107


@dataclass(frozen=True, slots=True)
class InetAddress:
    """TCP; ``to`` is the last port to try when listening."""

    host: str
    port: str
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket; ``is_abstract`` for one without a file."""

    path: str
    is_abstract: bool = False


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A vsock; both numbers as text, as in QAPI."""

    cid: str
    port: str


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A descriptor, by the name it was given or by number."""

    name: str


@dataclass(frozen=True, slots=True)
class ExecAddress:
    """A command that reads or writes the stream."""

    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileAddress:
    """A file; the stream begins ``offset`` bytes into it."""

    path: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class RdmaAddress:
    """RDMA: understood, but not served."""

    host: str
    port: str


Address = (
    InetAddress | UnixAddress | VsockAddress | FdAddress | ExecAddress | FileAddress | RdmaAddress
)


def parse_uri(text: str) -> Address:
    """Parse a migration URI.

    Raises:
        AddressError: With QEMU's text.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "tcp":
        return parse_inet(rest)
    if scheme == "unix":
        if not rest:
            raise AddressError("invalid Unix socket address")
        return UnixAddress(rest)
    if scheme == "vsock":
        cid, separator, port = rest.partition(":")
        if not separator or not cid or not port:
            raise AddressError(f"error parsing address '{rest}'")
        return VsockAddress(cid, port)
    if scheme == "fd":
        if not rest:
            raise AddressError("invalid file descriptor address")
        return FdAddress(rest)
    if scheme == "exec":
        return ExecAddress(("/bin/sh", "-c", rest))
    if scheme == "file":
        return _parse_file(rest)
    if scheme == "rdma":
        inet = parse_inet(rest)
        return RdmaAddress(inet.host, inet.port)
    raise AddressError(f"unknown migration protocol: {text}")


def parse_inet(text: str) -> InetAddress:
    """Parse ``[HOST]:PORT[,option=value ...]``; an IPv6 host stands in brackets.

    Raises:
        AddressError: With QEMU's text.
    """
    spec, *options = text.split(",")
    if spec.startswith(":"):
        host, port = "", spec[1:]
        if not port:
            raise AddressError(f"error parsing port in address '{text}'")
    elif spec.startswith("["):
        match = re.match(r"\[([^\]]{1,64})\]:(\S{1,32})$", spec)
        if not match:
            raise AddressError(f"error parsing IPv6 address '{text}'")
        host, port = match[1], match[2]
    else:
        host, separator, port = spec.rpartition(":")
        if not separator or not host or not port or ":" in host:
            raise AddressError(f"error parsing address '{text}'")
    values: dict[str, int | bool | None] = {}
    for option in options:
        name, separator, value = option.partition("=")
        if name == "to":
            if not value.isdigit() or int(value) > 65535:
                raise AddressError(f"error parsing to= argument '{value}'")
            values["to"] = int(value)
        elif name in ("ipv4", "ipv6", "keep-alive", "mptcp"):
            values[name.replace("-", "_")] = _on_off(name, value if separator else "on")
        else:
            raise AddressError(f"Invalid parameter '{name}'")
    return InetAddress(host, port, **values)  # type: ignore[arg-type]  # names match fields


def parse_size(text: str) -> int | None:
    """Bytes of ``4096``, ``0x1000`` or ``1M``; None if it is no size below 2^63."""
    match = _SIZE.match(text)
    if not match:
        return None
    size = int(match[1], 0 if match[1][:2].lower() == "0x" else 10) << _SHIFT[match[2].lower()]
    return size if size < 1 << 63 else None


def describe(address: Address) -> str:
    """One short text for messages and logs."""
    match address:
        case InetAddress(host, port):
            return f"{host}:{port}"
        case UnixAddress(path):
            return path
        case VsockAddress(cid, port):
            return f"{cid}:{port}"
        case FdAddress(name):
            return f"fd:{name}"
        case ExecAddress(args):
            return args[-1] if args else "exec"
        case FileAddress(path):
            return path
        case RdmaAddress(host, port):
            return f"{host}:{port}"


def address_from_qapi(value: Mapping[str, object]) -> Address:
    """Turn a checked QAPI MigrationAddress into an address.

    Args:
        value: Members as in QAPI, already of the right types.

    Raises:
        AddressError: A combination that QEMU refuses.
    """
    transport = value["transport"]
    if transport == "exec":
        args = value["args"]
        assert isinstance(args, list)
        if not args:
            raise AddressError("exec: the list of arguments is empty")
        return ExecAddress(tuple(str(arg) for arg in args))
    if transport == "file":
        offset = value["offset"]
        assert isinstance(offset, int)
        return FileAddress(str(value["filename"]), offset)
    if transport == "rdma":
        return RdmaAddress(str(value["host"]), str(value["port"]))
    kind = value["type"]
    if kind == "inet":
        to = value.get("to")
        return InetAddress(
            str(value["host"]),
            str(value["port"]),
            to=to if isinstance(to, int) else None,
            ipv4=_maybe(value.get("ipv4")),
            ipv6=_maybe(value.get("ipv6")),
            keep_alive=bool(value.get("keep-alive")),
            mptcp=bool(value.get("mptcp")),
        )
    if kind == "unix":
        return UnixAddress(str(value["path"]), bool(value.get("abstract")))
    if kind == "vsock":
        return VsockAddress(str(value["cid"]), str(value["port"]))
    return FdAddress(str(value["str"]))


def socket_address_to_qapi(address: Address) -> dict[str, object]:
    """The QAPI SocketAddress of a bound socket, for ``query-migrate``."""
    match address:
        case InetAddress():
            out: dict[str, object] = {"type": "inet", "host": address.host, "port": address.port}
            out["ipv6" if ":" in address.host else "ipv4"] = True
            return out
        case UnixAddress(path, is_abstract):
            out = {"type": "unix", "path": path}
            return out | {"abstract": True} if is_abstract else out
        case VsockAddress(cid, port):
            return {"type": "vsock", "cid": cid, "port": port}
        case _:
            return {"type": "fd", "str": describe(address)}


def check_unix_path(path: str) -> None:
    """Refuse a path that does not fit the kernel's address.

    Raises:
        AddressError: With QEMU's text.
    """
    if len(path.encode()) > _UNIX_PATH_LIMIT:
        raise AddressError(f"UNIX socket path '{path}' is too long")


def _parse_file(text: str) -> FileAddress:
    path, separator, option = text.rpartition(",offset=")
    if not separator:
        return FileAddress(text)
    offset = parse_size(option)
    if offset is None:
        raise AddressError(f"file URI has bad offset {option}: Invalid argument")
    return FileAddress(path, offset)


def _on_off(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise AddressError(f"Parameter '{name}' expects 'on' or 'off'")
    return value == "on"


def _maybe(value: object) -> bool | None:
    return value if isinstance(value, bool) else None

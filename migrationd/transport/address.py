"""Migration addresses: QEMU's URI form, its QAPI form, and plain values.

Reference: grammar and texts of QEMU's ``migrate`` and ``migrate-incoming``, as 11.1
answers (URI prefixes are case-sensitive).
"""

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from migrationd.errors import AddressError
from migrationd.units import parse_size

UNIX_PATH_LIMIT_BYTES = 107
"""What fits the kernel's address, less the NUL that ends a path."""

_OPTION_LIMIT = 1 << 32
_FLAG = {"on": True, "yes": True, "true": True, "y": True}
_FLAG |= {"off": False, "no": False, "false": False, "n": False}


@dataclass(frozen=True, slots=True)
class InetAddress:
    """TCP.

    Attributes:
        host: Name or number; empty stands for any address when listening.
        port: Service name or number.
        to: Last port to try when listening.
        ipv4: False forbids the family; true without ``ipv6`` takes nothing else.
        ipv6: As ``ipv4``.
        keep_alive: Whether TCP keep-alive probes are sent.
        mptcp: Whether the connection is multipath TCP.
        keep_alive_count: Probes without an answer that end the connection.
        keep_alive_idle: Seconds of silence before the first probe.
        keep_alive_interval: Seconds between probes.
    """

    host: str
    port: str
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    mptcp: bool = False
    keep_alive_count: int | None = None
    keep_alive_idle: int | None = None
    keep_alive_interval: int | None = None


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket.

    Attributes:
        path: File, or the name of an abstract socket.
        is_abstract: Whether it is a name without a file.
        is_tight: Whether an abstract name is as long as its text; otherwise NULs fill it up.
    """

    path: str
    is_abstract: bool = False
    is_tight: bool = True


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
    """A command that reads or writes the stream; the program comes first."""

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
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in _SCHEMES:
        raise AddressError(f"unknown migration protocol: {text}")
    _refuse_nul(rest)
    return _SCHEMES[scheme](rest)


def parse_inet(text: str) -> InetAddress:
    """Parse ``[HOST]:PORT[,option=value ...]``; an IPv6 host stands in brackets.

    Raises:
        AddressError: With QEMU's text.
    """
    spec, *options = text.split(",")
    spec = spec.removeprefix("addr=")
    if spec.startswith("["):
        match = re.fullmatch(r"\[([^\]]+)\]:(.+)", spec, re.DOTALL)
        if not match:
            raise AddressError(f"error parsing IPv6 address '{spec}'")
        host, port = match[1], match[2]
    else:
        host, _, port = spec.partition(":")
        if not port:
            raise AddressError(f"error parsing address '{spec}'")
    values: dict[str, int | bool] = {}
    for option in filter(None, options):
        _parse_inet_option(option, values)
    values.pop("numeric", None)
    return InetAddress(host, port, **values)  # type: ignore[arg-type]  # names match fields


def describe(address: Address) -> str:
    """One short text for messages and logs."""
    match address:
        case InetAddress(host, port) | RdmaAddress(host, port):
            return f"{host}:{port}"
        case UnixAddress(path) | FileAddress(path):
            return path
        case VsockAddress(cid, port):
            return f"{cid}:{port}"
        case FdAddress(name):
            return f"fd:{name}"
        case ExecAddress(args):
            return args[-1] if args else "exec"


def address_from_qapi(value: Mapping[str, object]) -> Address:
    """Turn a checked QAPI MigrationAddress into an address.

    Args:
        value: Members as in QAPI, already of the right types.

    Raises:
        AddressError: A combination that cannot serve.
    """
    for member in value.values():
        for text in member if isinstance(member, list) else [member]:
            if isinstance(text, str):
                _refuse_nul(text)
    transport = value["transport"]
    if transport == "exec":
        args = value["args"]
        assert isinstance(args, list)
        if not args:
            # Differs from QEMU, which crashes.
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
        return _inet_from_qapi(value)
    if kind == "unix":
        return UnixAddress(
            str(value["path"]),
            is_abstract=bool(value.get("abstract")),
            is_tight=value.get("tight") is not False,
        )
    if kind == "vsock":
        return VsockAddress(str(value["cid"]), str(value["port"]))
    return FdAddress(str(value["str"]))


def socket_address_to_qapi(address: Address) -> dict[str, object]:
    """The QAPI SocketAddress of a bound socket, for ``query-migrate``."""
    match address:
        case InetAddress(host, port):
            family = "ipv6" if ":" in host else "ipv4"
            return {"type": "inet", "host": host, "port": port, family: True}
        case UnixAddress(path, is_abstract, is_tight):
            out: dict[str, object] = {"type": "unix", "path": path}
            return out | {"abstract": True, "tight": is_tight} if is_abstract else out
        case VsockAddress(cid, port):
            return {"type": "vsock", "cid": cid, "port": port}
        case _:
            return {"type": "fd", "str": describe(address)}


def unix_target(address: UnixAddress) -> str | bytes:
    """The kernel's address of a unix socket.

    Raises:
        AddressError: It does not fit, with QEMU's text.
    """
    name = os.fsencode(address.path)
    if len(name) > UNIX_PATH_LIMIT_BYTES:
        raise AddressError(f"UNIX socket path '{address.path}' is too long")
    if not name:
        raise AddressError("invalid Unix socket address")
    if not address.is_abstract:
        return address.path
    return b"\0" + (name if address.is_tight else name.ljust(UNIX_PATH_LIMIT_BYTES, b"\0"))


def _parse_unix(text: str) -> UnixAddress:
    if not text:
        raise AddressError("invalid Unix socket address")
    return UnixAddress(text)


def _parse_vsock(text: str) -> VsockAddress:
    match = re.fullmatch(r"([^:]+):([^,]+)(.*)", text, re.DOTALL)
    if not match:
        raise AddressError(f"error parsing address '{text}'")
    if match[3]:
        raise AddressError(f"trailing characters in address '{text}'")
    return VsockAddress(match[1], match[2])


def _parse_fd(text: str) -> FdAddress:
    if not text:
        raise AddressError("invalid file descriptor address")
    return FdAddress(text)


def _parse_exec(text: str) -> ExecAddress:
    return ExecAddress(("/bin/sh", "-c", text))


def _parse_file(text: str) -> FileAddress:
    path, separator, option = text.partition(",offset=")
    if not separator:
        return FileAddress(text)
    try:
        return FileAddress(path, parse_size(option))
    except (ValueError, OverflowError) as error:
        number = errno.EINVAL if isinstance(error, ValueError) else errno.ERANGE
        raise AddressError(f"file URI has bad offset {option}: {os.strerror(number)}") from error


def _parse_rdma(text: str) -> RdmaAddress:
    inet = parse_inet(text)
    return RdmaAddress(inet.host, inet.port)


_SCHEMES: dict[str, Callable[[str], Address]] = {
    "tcp": parse_inet,
    "unix": _parse_unix,
    "vsock": _parse_vsock,
    "fd": _parse_fd,
    "exec": _parse_exec,
    "file": _parse_file,
    "rdma": _parse_rdma,
}

_FLAG_OPTIONS = ("ipv4", "ipv6", "keep-alive", "mptcp", "numeric")
_NUMBER_OPTIONS = ("to", "keep-alive-count", "keep-alive-idle", "keep-alive-interval")


def _parse_inet_option(option: str, values: dict[str, int | bool]) -> None:
    name, separator, value = option.partition("=")
    if not separator:
        is_negated = name.startswith("no") and name[2:] in _FLAG_OPTIONS
        name, value = (name[2:], "off") if is_negated else (name, "on")
    if name in _FLAG_OPTIONS:
        if value not in _FLAG:
            raise AddressError(f"Parameter '{name}' expects 'on' or 'off'")
        values[name.replace("-", "_")] = _FLAG[value]
    elif name in _NUMBER_OPTIONS:
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]{1,8}|[0-9]{1,10})", value):
            raise AddressError(f"Parameter '{name}' expects a number")
        number = int(value, 0) if "0x" in value else int(value)
        values[name.replace("-", "_")] = number % _OPTION_LIMIT
    else:
        raise AddressError(f"Invalid parameter '{name}'")


def _inet_from_qapi(value: Mapping[str, object]) -> InetAddress:
    known = {
        field.name: member
        for field in fields(InetAddress)
        if (member := value.get(field.name.replace("_", "-"))) is not None
    }
    return InetAddress(**known)  # type: ignore[arg-type]  # checked against the schema


def _refuse_nul(text: str) -> None:
    # Differs from QEMU, which cannot see what stands behind a NUL.
    if "\0" in text:
        raise AddressError("an address cannot contain a NUL character")

"""Addresses of migration channels: QAPI's union of transports.

Reference: ``MigrationAddress`` and ``SocketAddress``. A value that belongs to no branch
goes to one that cannot be satisfied, so that its text is the discriminator's.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from migrationd.qmp.models.base import QapiModel, QapiUnion, Size, UInt16, UInt32, optional


class InetMembers(QapiModel):
    """What a TCP address is; ``port`` is text, a number or the name of a service."""

    host: str
    port: str
    numeric: bool = optional(since="2.9")
    to: UInt16 = optional()
    ipv4: bool = optional()
    ipv6: bool = optional()
    keep_alive: bool = optional(since="4.2")
    keep_alive_count: UInt32 = optional(since="10.1")
    keep_alive_idle: UInt32 = optional(since="10.1", unit="s")
    keep_alive_interval: UInt32 = optional(since="10.1", unit="s")
    mptcp: bool = optional(since="6.1")


class UnixMembers(QapiModel):
    """What a Unix socket address is."""

    path: str
    abstract: bool = optional(since="5.1")
    tight: bool = optional(since="5.1")


class VsockMembers(QapiModel):
    """What a vsock address is."""

    cid: str
    port: str


class FdMembers(QapiModel):
    """What a descriptor given by ``getfd`` is."""

    str_: str


class InetSocketAddress(InetMembers):
    """TCP address."""

    type: Literal["inet"]


class UnixSocketAddress(UnixMembers):
    """Unix socket address."""

    type: Literal["unix"]


class VsockSocketAddress(VsockMembers):
    """Vsock address."""

    type: Literal["vsock"]


class FdSocketAddress(FdMembers):
    """Descriptor given by ``getfd``."""

    type: Literal["fd"]


class SocketAddressBase(QapiModel):
    """What every socket address has."""

    type: Literal["inet", "unix", "vsock", "fd"]


SocketAddress = Annotated[
    InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress,
    Field(discriminator="type"),
    QapiUnion(
        SocketAddressBase,
        "type",
        {"inet": InetMembers, "unix": UnixMembers, "vsock": VsockMembers, "fd": FdMembers},
    ),
]


class InetChannelAddress(InetSocketAddress):
    """TCP address of a channel."""

    transport: Literal["socket"]


class UnixChannelAddress(UnixSocketAddress):
    """Unix socket address of a channel."""

    transport: Literal["socket"]


class VsockChannelAddress(VsockSocketAddress):
    """Vsock address of a channel."""

    transport: Literal["socket"]


class FdChannelAddress(FdSocketAddress):
    """Descriptor of a channel."""

    transport: Literal["socket"]


class ExecMembers(QapiModel):
    """What a command is, program first."""

    args: list[str]


class FileMembers(QapiModel):
    """What a file is, and where the stream begins in it."""

    filename: str
    offset: Size


class ExecChannelAddress(ExecMembers):
    """Command, program first."""

    transport: Literal["exec"]


class RdmaChannelAddress(InetMembers):
    """RDMA address."""

    transport: Literal["rdma"]


class FileChannelAddress(FileMembers):
    """File and where the stream begins in it."""

    transport: Literal["file"]


class UntypedSocketAddress(QapiModel):
    """A socket address whose ``type`` is missing or unknown: always refused."""

    transport: Literal["socket"]
    type: Literal["inet", "unix", "vsock", "fd"]


class UnknownTransport(QapiModel):
    """An address whose ``transport`` is missing or unknown: always refused."""

    transport: Literal["socket", "exec", "rdma", "file"]


_SOCKET_TYPES = ("inet", "unix", "vsock", "fd")
_TRANSPORTS = ("exec", "rdma", "file")


def _branch(value: object) -> str:
    """Which branch of the union a value belongs to."""
    if not isinstance(value, dict):
        return "@unknown"
    transport = value.get("transport")
    if transport == "socket":
        kind = value.get("type")
        return f"@{kind}" if kind in _SOCKET_TYPES else "@socket"
    return f"@{transport}" if transport in _TRANSPORTS else "@unknown"


MigrationAddress = Annotated[
    Annotated[InetChannelAddress, Tag("@inet")]
    | Annotated[UnixChannelAddress, Tag("@unix")]
    | Annotated[VsockChannelAddress, Tag("@vsock")]
    | Annotated[FdChannelAddress, Tag("@fd")]
    | Annotated[UntypedSocketAddress, Tag("@socket")]
    | Annotated[ExecChannelAddress, Tag("@exec")]
    | Annotated[RdmaChannelAddress, Tag("@rdma")]
    | Annotated[FileChannelAddress, Tag("@file")]
    | Annotated[UnknownTransport, Tag("@unknown")],
    Discriminator(_branch),
    QapiUnion(
        UnknownTransport,
        "transport",
        {"socket": SocketAddress, "exec": ExecMembers, "rdma": InetMembers, "file": FileMembers},
    ),
]

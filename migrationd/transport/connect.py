"""Opening outgoing channels.

Sockets connect asynchronously: a refused or unreachable address is a failed
migration, not a failed command. Files, commands and descriptors open at once and do
fail the command.

Reference: QEMU's ``migrate``; texts as in its ``error-desc``.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable

from migrationd.errors import AddressError, ConnectFailed
from migrationd.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    InetAddress,
    RdmaAddress,
    UnixAddress,
    VsockAddress,
    check_unix_path,
    describe,
)
from migrationd.transport.channel import Channel

FdLookup = Callable[[str], int]
"""Gives up the descriptor of a name; raises an error of ours if there is none."""


def is_opened_now(address: Address) -> bool:
    """Whether :func:`open_now` applies, not :func:`connect`."""
    return isinstance(address, FdAddress | ExecAddress | FileAddress | RdmaAddress)


def open_now(address: Address, fds: FdLookup) -> Channel:
    """Open a file, command or descriptor for an outgoing stream.

    Raises:
        ConnectFailed: It cannot be opened.
        AddressError: It cannot serve.
    """
    match address:
        case FdAddress(name):
            return Channel(fds(name))
        case ExecAddress(args):
            return spawn(args, outgoing=True)
        case FileAddress(path, offset):
            return _create_file(path, offset)
        case RdmaAddress():
            raise AddressError("rdma: this host has no RDMA support; use tcp: or unix:")
        case _:
            raise AddressError(f"'{describe(address)}' is not opened at once")


async def connect(address: Address) -> Channel:
    """Connect a socket; cancelling the task closes the half-open socket.

    Raises:
        ConnectFailed: Nobody answered, or the name cannot be resolved.
        AddressError: The address cannot be used on this host.
    """
    match address:
        case InetAddress():
            return await _connect_inet(address)
        case UnixAddress(path, is_abstract):
            check_unix_path(path)
            target = "\0" + path if is_abstract else path
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            return await _connect_socket(sock, target, f"Failed to connect to '{path}'")
        case VsockAddress(cid, port):
            vsock, target_pair = vsock_socket(cid, port)
            return await _connect_socket(vsock, target_pair, f"Failed to connect to '{cid}:{port}'")
        case _:
            raise AddressError(f"'{describe(address)}' is no socket address")


async def resolve(address: InetAddress, *, passive: bool) -> list[tuple[int, tuple[str, int]]]:
    """Look an address up.

    Returns:
        Socket family and socket address of each result.

    Raises:
        ConnectFailed: With the resolver's text.
    """
    family = socket.AF_UNSPEC
    if (address.ipv4 is True and address.ipv6 is not True) or address.ipv6 is False:
        family = socket.AF_INET
    elif (address.ipv6 is True and address.ipv4 is not True) or address.ipv4 is False:
        family = socket.AF_INET6
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host or None,
            address.port,
            family=family,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE if passive else 0,
        )
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConnectFailed(
            f"address resolution failed for {address.host}:{address.port}: {reason}"
        ) from error
    return [(item[0], (str(item[4][0]), int(item[4][1]))) for item in found]


def spawn(args: tuple[str, ...], *, outgoing: bool) -> Channel:
    """Start a command with a pipe to its input (outgoing) or from its output.

    Raises:
        ConnectFailed: It cannot be started.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (write_fd, read_fd) if outgoing else (read_fd, write_fd)
    try:
        child = subprocess.Popen(
            args,
            stdin=theirs if outgoing else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if outgoing else theirs,
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours)
        raise ConnectFailed(f"Failed to execute '{args[0]}': {error.strerror}") from error
    finally:
        os.close(theirs)
    return Channel(ours, child=child)


def vsock_socket(cid: str, port: str) -> tuple[socket.socket, tuple[int, int]]:
    """A vsock and its address.

    Raises:
        AddressError: The numbers are wrong or this host has no vsock.
    """
    if not cid.isdigit() or not port.isdigit() or max(int(cid), int(port)) >= 1 << 32:
        raise AddressError(f"Failed to parse vsock address '{cid}:{port}'")
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"vsock is not available on this host: {error.strerror}") from error
    return sock, (int(cid), int(port))


async def _connect_inet(address: InetAddress) -> Channel:
    what = f"Failed to connect to '{address.host}:{address.port}'"
    failure: ConnectFailed | None = None
    for family, target in await resolve(address, passive=False):
        sock = socket.socket(family, socket.SOCK_STREAM)
        if address.keep_alive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            return await _connect_socket(sock, target, what)
        except ConnectFailed as error:
            failure = error
    raise failure or ConnectFailed(f"{what}: no address found")


async def _connect_socket(
    sock: socket.socket, target: str | tuple[str | int, int], what: str
) -> Channel:
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, target)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConnectFailed(f"{what}: {reason}") from error
    except BaseException:
        sock.close()
        raise
    return Channel(sock.detach())


def _create_file(path: str, offset: int) -> Channel:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConnectFailed(f"Could not create '{path}': {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # pipes and devices have no length
            os.ftruncate(fd, offset)
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        raise ConnectFailed(f"Could not seek in '{path}': {error.strerror}") from error
    return Channel(fd, is_durable=True)

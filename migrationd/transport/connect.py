"""Opening outgoing channels.

Sockets connect asynchronously: a refused or unreachable address is a failed
migration, not a failed command. Files, commands and descriptors open at once and do
fail the command.

Reference: QEMU's ``migrate``; texts as in its ``error-desc``, 11.1.
"""

import asyncio
import errno
import os
import select
import socket
import stat
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
    describe,
    unix_target,
)
from migrationd.transport.channel import Channel
from migrationd.transport.command import start_command
from migrationd.transport.congestion import use_no_pacing_on_this_host
from migrationd.transport.fdset import open_file
from migrationd.transport.resolve import SocketTarget, resolve
from migrationd.units import parse_whole

FdLookup = Callable[[str], int]
"""Gives up the descriptor of a name; raises an error of ours if there is none."""

_RDMA_DEVICE = "/dev/infiniband/rdma_cm"

_IPPROTO_MPTCP = 262
_BACKLOG_RETRY_S = 0.01
_OFFSET_LIMIT = 1 << 63


def rdma_refusal(missing: str) -> AddressError:
    """Why there is no RDMA.

    Args:
        missing: What QEMU fails to make on a host without RDMA.
    """
    if os.path.exists(_RDMA_DEVICE):
        return AddressError("RDMA is not built into migrationd: use tcp: or unix:")
    return AddressError(f"RDMA ERROR: could not create {missing}")


def is_opened_now(address: Address) -> bool:
    """Whether :func:`open_now` applies, not :func:`connect`."""
    return isinstance(address, FdAddress | ExecAddress | FileAddress | RdmaAddress)


def open_now(address: Address, fds: FdLookup, *, keep: tuple[int, int] | None = None) -> Channel:
    """Open a file, command or descriptor for an outgoing stream.

    Args:
        address: What to open.
        fds: Where the descriptor of an :class:`FdAddress` comes from; it is consumed.
        keep: Device and inode of a file that must not be overwritten, or None.

    Raises:
        ConnectFailed: It cannot be opened.
        AddressError: It cannot serve.
    """
    match address:
        case FdAddress(name):
            return channel_of_fd(fds(name))
        case ExecAddress(args):
            return open_command(args, outgoing=True)
        case FileAddress(path, offset):
            return _create_file(path, offset, keep)
        case RdmaAddress():
            raise rdma_refusal("CM channel")
        case _:
            raise AddressError(f"'{describe(address)}' is not opened at once")


async def connect(address: Address) -> Channel:
    """Connect a socket; cancelling the task closes the half-open socket.

    Raises:
        ConnectFailed: Nobody answered, or the name cannot be resolved.
        AddressError: The address cannot be used on this host.
    """
    what = f"Failed to connect to '{describe(address)}'"
    match address:
        case InetAddress():
            return await _connect_inet(address, what)
        case UnixAddress():
            target = unix_target(address)
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError as error:
                raise ConnectFailed(f"{what}: {error.strerror}") from error
            return await _connect_socket(sock, target, what)
        case VsockAddress(cid, port):
            vsock, pair = vsock_socket(cid, port)
            return await _connect_socket(vsock, pair, what)
        case _:
            raise AddressError(f"'{describe(address)}' is no socket address")


def channel_of_fd(fd: int) -> Channel:
    """A channel over a descriptor that somebody handed over; it is consumed.

    Raises:
        AddressError: It can carry no stream.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise AddressError(f"fd: {error.strerror}") from error
    reason = None
    if stat.S_ISREG(mode):
        reason = "fd: migration to a file is not supported. Use file: instead."
    elif stat.S_ISDIR(mode):
        reason = "fd: a directory cannot carry a stream"
    elif stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM:
            reason = "fd: the socket is no stream socket"
        sock.detach()
    if reason is not None:
        os.close(fd)
        raise AddressError(reason)
    return Channel(fd)


def open_command(args: tuple[str, ...], *, outgoing: bool) -> Channel:
    """Start a command and take one end of a pipe to or from it.

    Raises:
        ConnectFailed: It cannot be started.
    """
    fd, command = start_command(args, outgoing=outgoing)
    return Channel(fd, command=command)


def inet_socket(family: int, address: InetAddress) -> socket.socket:
    """A TCP socket with the options of an address.

    Raises:
        OSError: The kernel has none.
    """
    protocol = _IPPROTO_MPTCP if address.mptcp else 0
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        set_keep_alive(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def set_keep_alive(sock: socket.socket, address: InetAddress) -> None:
    """Switch keep-alive probes on when the address asks for them.

    Raises:
        OSError: A number is out of range.
    """
    if not address.keep_alive:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPCNT, address.keep_alive_count),
        (socket.TCP_KEEPIDLE, address.keep_alive_idle),
        (socket.TCP_KEEPINTVL, address.keep_alive_interval),
    ):
        if value:
            sock.setsockopt(socket.IPPROTO_TCP, option, min(value, 0x7FFFFFFF))


def vsock_socket(cid: str, port: str) -> tuple[socket.socket, tuple[int, int]]:
    """A vsock and its address.

    Raises:
        ConnectFailed: The numbers are wrong.
        AddressError: This host has no vsock.
    """
    numbers = []
    for name, text in (("cid", cid), ("port", port)):
        number = parse_whole(text, (1 << 32) - 1)
        if number is None:
            raise ConnectFailed(f"Failed to parse {name} '{text}'")
        numbers.append(number)
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise AddressError(f"vsock is not available on this host: {error.strerror}") from error
    return sock, (numbers[0], numbers[1])


async def _connect_inet(address: InetAddress, what: str) -> Channel:
    failure: ConnectFailed | None = None
    for family, target in await resolve(address, passive=False):
        try:
            sock = inet_socket(family, address)
        except OSError as error:
            failure = ConnectFailed(f"{what}: {error.strerror}")
            continue
        use_no_pacing_on_this_host(sock, target)
        try:
            return await _connect_socket(sock, target, what)
        except ConnectFailed as error:
            failure = error
    raise failure or ConnectFailed(f"{what}: no address found")


async def _connect_socket(sock: socket.socket, target: SocketTarget, what: str) -> Channel:
    sock.setblocking(False)
    try:
        await _connected(sock, target)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConnectFailed(f"{what}: {reason}") from error
    except BaseException:
        sock.close()
        raise
    return Channel(sock.detach())


async def _connected(sock: socket.socket, target: SocketTarget) -> None:
    """Connect; unlike the loop's own call, wait for a unix listener whose backlog is full."""
    while True:
        try:
            sock.connect(target)
            return
        except BlockingIOError:
            if sock.family != socket.AF_UNIX:
                break
        await asyncio.sleep(_BACKLOG_RETRY_S)
    # On this host there is an answer already.
    if not _is_writable(sock):
        await _writable(sock)
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _is_writable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock.fileno())


def _create_file(path: str, offset: int, keep: tuple[int, int] | None) -> Channel:
    try:
        # Non-blocking: a FIFO without a reader must not hold the monitor.
        fd = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
    except OSError as error:
        raise ConnectFailed(f"Could not create '{path}': {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) == keep:
            raise AddressError(f"'{path}' is the file that the guest itself is in")
        if stat.S_ISREG(status.st_mode):
            _truncate(fd, offset)
        elif offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except (OSError, OverflowError) as error:
        os.close(fd)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConnectFailed(f"Could not seek in '{path}': {reason}") from error
    except BaseException:
        os.close(fd)
        raise
    return Channel(fd, is_durable=True)


def _truncate(fd: int, offset: int) -> None:
    try:
        if offset >= _OFFSET_LIMIT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.ftruncate(fd, offset)
    except OSError as error:
        raise ConnectFailed(
            f"failed to truncate migration file to offset {offset:x}: {error.strerror}"
        ) from error
    os.lseek(fd, offset, os.SEEK_SET)

"""Opening incoming channels: listeners, and what is read at once.

Binding happens before anything is awaited, so that a command can fail with it.

Reference: QEMU's ``migrate-incoming``; a unix path is unlinked and bound again.
"""

import asyncio
import contextlib
import os
import socket
import stat

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
    socket_address_to_qapi,
)
from migrationd.transport.channel import Channel
from migrationd.transport.connect import FdLookup, resolve, spawn, vsock_socket

BACKLOG = 16


class Listener:
    """Where a source's channels come from: listening sockets, or one open channel.

    Args:
        sockets: Listening sockets.
        channel: A channel that is open already (file, command, descriptor).
        path: File of a unix socket, removed at the end.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        channel: Channel | None = None,
        path: str | None = None,
    ) -> None:
        self._sockets = sockets
        self._channel = channel
        self._path = path
        self.addresses: tuple[Address, ...] = tuple(_bound_address(sock) for sock in sockets)

    def qapi_addresses(self) -> list[dict[str, object]]:
        """QAPI SocketAddress of each listening socket."""
        return [socket_address_to_qapi(address) for address in self.addresses]

    async def accept(self) -> Channel:
        """The next channel; the listening ones are closed to others by :meth:`close`.

        Raises:
            ConnectFailed: The listener broke.
        """
        if self._channel is not None:
            channel, self._channel = self._channel, None
            return channel
        loop = asyncio.get_running_loop()
        tasks = [asyncio.ensure_future(loop.sock_accept(sock)) for sock in self._sockets]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            connection, _ = done.pop().result()
            for late in done:  # two at the same instant: the first one is the source
                late.result()[0].close()
        except OSError as error:
            raise ConnectFailed(f"Failed to accept a connection: {error.strerror}") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return Channel(connection.detach())

    def close(self) -> None:
        """Stop listening; any number of times."""
        for sock in self._sockets:
            if sock.fileno() >= 0:
                sock.close()
                if self._path is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._path)
        if self._channel is not None:
            self._channel.close()
            self._channel = None


async def listen(address: Address, fds: FdLookup) -> Listener:
    """Open a listener, or the one channel that an address stands for.

    Raises:
        ConnectFailed: With QEMU's text.
        AddressError: The address cannot serve.
    """
    match address:
        case InetAddress():
            return Listener(await _bind_inet(address))
        case UnixAddress():
            return _listen_unix(address)
        case VsockAddress(cid, port):
            sock, target = vsock_socket(cid, port)
            return Listener([_bound(sock, target, f"{cid}:{port}")])
        case FdAddress(name):
            return _listen_fd(fds(name))
        case ExecAddress(args):
            return Listener([], spawn(args, outgoing=False))
        case FileAddress(path, offset):
            return Listener([], _open_file(path, offset))
        case RdmaAddress():
            raise AddressError("rdma: this host has no RDMA support; use tcp: or unix:")


async def _bind_inet(address: InetAddress) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    failure: ConnectFailed | None = None
    for family, (host, port) in await resolve(address, passive=True):
        for candidate in range(port, max(port, address.to or 0) + 1):
            # A second family takes the port that the first one was given.
            if sockets and not port:
                candidate = sockets[0].getsockname()[1]
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sockets.append(_bound(sock, (host, candidate), f"{address.host}:{address.port}"))
                break
            except ConnectFailed as error:
                failure = error
    if not sockets:
        raise failure or ConnectFailed(f"Failed to bind socket to {describe(address)}")
    return sockets


def _listen_unix(address: UnixAddress) -> Listener:
    check_unix_path(address.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if address.is_abstract:
        return Listener([_bound(sock, "\0" + address.path, address.path)])
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(address.path).st_mode):
            os.unlink(address.path)
    return Listener([_bound(sock, address.path, address.path)], path=address.path)


def _listen_fd(fd: int) -> Listener:
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        sock = socket.socket(fileno=fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            return Listener([sock])
        fd = sock.detach()
    return Listener([], Channel(fd))


def _open_file(path: str, offset: int) -> Channel:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except OSError as error:
        raise ConnectFailed(f"Could not open '{path}': {error.strerror}") from error
    return Channel(fd)


def _bound(sock: socket.socket, target: str | tuple[str | int, int], name: str) -> socket.socket:
    try:
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConnectFailed(f"Failed to bind socket to {name}: {reason}") from error
    sock.setblocking(False)
    return sock


def _bound_address(sock: socket.socket) -> Address:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        if isinstance(name, bytes):
            return UnixAddress(name[1:].decode("latin-1"), is_abstract=True)
        return UnixAddress(str(name))
    if sock.family == socket.AF_VSOCK:
        return VsockAddress(str(name[0]), str(name[1]))
    return InetAddress(str(name[0]), str(name[1]))

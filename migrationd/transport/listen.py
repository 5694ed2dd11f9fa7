"""Opening incoming channels: listeners, and what is read at once.

Reference: QEMU's ``migrate-incoming``, texts of 11.1.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable

from migrationd.errors import ConnectFailed, MigrationdError
from migrationd.linux.socket_file import SocketFile, remove_stale
from migrationd.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    InetAddress,
    RdmaAddress,
    UnixAddress,
    VsockAddress,
    socket_address_to_qapi,
    unix_target,
)
from migrationd.transport.channel import Channel
from migrationd.transport.connect import (
    FdLookup,
    channel_of_fd,
    inet_socket,
    open_command,
    rdma_refusal,
    set_keep_alive,
    vsock_socket,
)
from migrationd.transport.fdset import open_file
from migrationd.transport.resolve import SocketTarget, resolve

log = logging.getLogger(__name__)

BACKLOG = 512
"""More than the channels of one migration; the kernel may allow fewer."""

_HANDSHAKES_LIMIT = 512
_ORDER_WAIT_S = 0.5
_PORT_LIMIT = 65535
_SKIPPED_ACCEPT_ERRORS = (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH)


class Listener:
    """Where a source's channels come from: listening sockets, or one open channel.

    Used on the event loop only.

    Args:
        sockets: Listening sockets, non-blocking.
        channel: A channel that is open already (file, command, descriptor).
        address: What was asked for; its options go to accepted connections.
        path: File of a unix socket that was bound here; removed at the end.

    Attributes:
        addresses: Where it listens, with the real ports, in the order of binding.
        secure: Makes an encrypted channel of one that was accepted, or gives it back; its
            errors end that connection, and the next may come.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        channel: Channel | None = None,
        *,
        address: Address | None = None,
        path: str | None = None,
    ) -> None:
        self._sockets = sockets
        self._channel = channel
        self._address = address
        self._file = SocketFile(path) if path is not None else None
        self._ready = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._is_single = channel is not None
        self._handshakes: dict[asyncio.Task[Channel], None] = {}
        self.secure: Callable[[Channel], Awaitable[Channel]] | None = None
        self.addresses: tuple[Address, ...] = tuple(_bound_address(sock) for sock in sockets)

    def qapi_addresses(self) -> list[dict[str, object]]:
        """QAPI SocketAddress of each listening socket, newest first as in QEMU."""
        return [socket_address_to_qapi(address) for address in reversed(self.addresses)]

    async def accept(self) -> Channel:
        """Wait for the next channel; one task at a time.

        Raises:
            ConnectFailed: The listener broke or was closed, or its only channel is taken.
        """
        if self.secure is None:
            return await self._accept()
        if self._is_single:
            return await self.secure(await self._accept())
        while True:
            if (channel := await self._secured()) is not None:
                return channel
            accepting = asyncio.ensure_future(self._accept())
            try:
                await asyncio.wait(
                    {accepting, *self._handshakes}, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                accepting.cancel()
                await asyncio.wait({accepting})
                if not accepting.cancelled() and accepting.exception() is None:
                    self._shake_hands(accepting.result())
            if not accepting.cancelled() and not self._handshakes:
                accepting.result()

    async def waiting(self, timeout_s: float) -> list[Channel]:
        """The channels that came besides those that were accepted, without waiting for more.

        Args:
            timeout_s: How long their handshakes may take.
        """
        found = []
        for sock in () if self._is_closed else self._sockets:
            while (connection := self._try_accept(sock)) is not None:
                channel = Channel(connection.detach())
                if self.secure is None:
                    found.append(channel)
                else:
                    self._shake_hands(channel)
        if self._handshakes:
            await asyncio.wait(self._handshakes, timeout=timeout_s)
            while (secured := await self._secured()) is not None:
                found.append(secured)
        return found

    def _shake_hands(self, channel: Channel) -> None:
        assert self.secure is not None
        if self._is_closed or len(self._handshakes) >= _HANDSHAKES_LIMIT:
            channel.close()
            return
        task = asyncio.create_task(_call(self.secure, channel))
        # One that is cancelled before it began does not get to close its channel.
        task.add_done_callback(lambda done: channel.close() if done.cancelled() else None)
        self._handshakes[task] = None

    async def _secured(self) -> Channel | None:
        """The first encrypted channel that is ready; one that came before it has a moment more."""
        done = [task for task in self._handshakes if task.done()]
        if done and done[0] is not next(iter(self._handshakes)):
            earlier = list(self._handshakes)[: list(self._handshakes).index(done[0])]
            await asyncio.wait(earlier, timeout=_ORDER_WAIT_S)
            done = [task for task in self._handshakes if task.done()]
        for task in done:
            del self._handshakes[task]
            if task.cancelled():
                continue
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, MigrationdError):
                raise error
            log.warning("a connection was refused: %s", error)
        return None

    async def _accept(self) -> Channel:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            return channel
        while True:
            if self._is_closed or not self._sockets:
                raise ConnectFailed("no further connection can come")
            for sock in self._sockets:
                connection = self._try_accept(sock)
                if connection is not None:
                    return Channel(connection.detach())
            self._watch()
            try:
                await self._ready.wait()
            finally:
                self._unwatch()

    def close(self) -> None:
        """Stop listening; any number of times. A pending :meth:`accept` fails."""
        if self._is_closed:
            return
        self._is_closed = True
        self._unwatch()
        self._ready.set()
        if self._file is not None:
            self._file.remove()
        for sock in self._sockets:
            sock.close()
        for task in self._handshakes:
            task.cancel()
            task.add_done_callback(_close_result)
        self._handshakes.clear()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _watch(self) -> None:
        self._ready.clear()
        self._loop = asyncio.get_running_loop()
        for sock in self._sockets:
            self._loop.add_reader(sock.fileno(), self._ready.set)

    def _unwatch(self) -> None:
        if self._loop is not None:
            for sock in self._sockets:
                self._loop.remove_reader(sock.fileno())
            self._loop = None

    def _try_accept(self, sock: socket.socket) -> socket.socket | None:
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            if error.errno in _SKIPPED_ACCEPT_ERRORS:
                return None
            raise ConnectFailed(f"Unable to accept connection: {error.strerror}") from error
        if isinstance(self._address, InetAddress):
            with contextlib.suppress(OSError):
                set_keep_alive(connection, self._address)
        return connection


async def _call(secure: Callable[[Channel], Awaitable[Channel]], channel: Channel) -> Channel:
    try:
        return await secure(channel)
    except BaseException:
        channel.close()
        raise


def _close_result(task: asyncio.Task[Channel]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def listen(address: Address, fds: FdLookup) -> Listener:
    """Open a listener, or the one channel that an address stands for.

    Args:
        address: Where the source will come, or what is read.
        fds: Where the descriptor of an :class:`FdAddress` comes from; it is consumed.

    Raises:
        ConnectFailed: With QEMU's text.
        AddressError: The address cannot serve.
    """
    match address:
        case InetAddress():
            return Listener(await _bind_inet(address), address=address)
        case UnixAddress():
            return Listener(
                [_bind_unix(address)], path=None if address.is_abstract else address.path
            )
        case VsockAddress(cid, port):
            sock, target = vsock_socket(cid, port)
            try:
                _bind(sock, target)
            except OSError as error:
                raise ConnectFailed(f"Failed to bind socket: {error.strerror}") from error
            return Listener([sock])
        case FdAddress(name):
            return _listen_fd(fds(name))
        case ExecAddress(args):
            return Listener([], open_command(args, outgoing=False))
        case FileAddress(path, offset):
            return Listener([], _open_file(path, offset))
        case RdmaAddress():
            raise rdma_refusal("rdma event channel")


async def _bind_inet(address: InetAddress) -> list[socket.socket]:
    """One listening socket for each address of the host that can be bound."""
    sockets: list[socket.socket] = []
    failure: ConnectFailed | None = None
    for family, target in await resolve(address, passive=True):
        # Differs from QEMU: where the kernel chooses, all families share one port.
        chosen = sockets[0].getsockname()[1] if sockets and not target[1] else None
        try:
            sockets.append(_bind_range(address, family, target, chosen))
        except ConnectFailed as error:
            failure = error
    if not sockets:
        raise failure or ConnectFailed("Failed to bind socket: no address found")
    return sockets


def _bind_range(
    address: InetAddress, family: int, target: tuple[str | int, ...], chosen: int | None
) -> socket.socket:
    """Bind to the first free port of the range."""
    host, asked, *scope = target
    first = int(asked)
    if chosen is not None:
        candidates = [chosen, 0]
    else:
        candidates = list(range(first, max(first, min(address.to or 0, _PORT_LIMIT)) + 1))
    for port in candidates:
        for is_dual in _stacks(address, family):
            try:
                sock = inet_socket(family, address)
            except OSError as error:
                raise ConnectFailed(f"Failed to create socket: {error.strerror}") from error
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
                _bind(sock, (host, port, *scope))
                return sock
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRINUSE:
                    raise ConnectFailed(f"Failed to bind socket: {error.strerror}") from error
    raise ConnectFailed(f"Failed to find an available port: {os.strerror(errno.EADDRINUSE)}")


def _stacks(address: InetAddress, family: int) -> tuple[bool, ...]:
    """Whether an IPv6 socket takes IPv4 as well, in the order of trying."""
    wants_both = address.ipv4 is None and address.ipv6 is None
    wants_both = wants_both or bool(address.ipv4 and address.ipv6)
    return (True, False) if wants_both and family == socket.AF_INET6 else (False,)


def _bind_unix(address: UnixAddress) -> socket.socket:
    target = unix_target(address)
    if not address.is_abstract:
        # Differs from QEMU, which removes any file: only a socket can be a stale one.
        remove_stale(address.path)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _bind(sock, target)
    except OSError as error:
        raise ConnectFailed(f"Failed to bind socket to {address.path}: {error.strerror}") from error
    return sock


def _bind(sock: socket.socket, target: SocketTarget) -> None:
    """Bind, listen and make non-blocking; closes the socket when it fails."""
    try:
        sock.bind(target)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise


def _listen_fd(fd: int) -> Listener:
    # Differs from QEMU: a socket that listens already, such as a service manager's, is taken too.
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            sock = socket.socket(fileno=fd)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.set_inheritable(False)
                sock.setblocking(False)
                return Listener([sock])
            sock.detach()
    return Listener([], channel_of_fd(fd))


def _open_file(path: str, offset: int) -> Channel:
    try:
        # Non-blocking: a FIFO without a writer must not hold the monitor.
        fd = open_file(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ConnectFailed(f"Could not open '{path}': {error.strerror}") from error
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except (OSError, OverflowError) as error:
        os.close(fd)
        reason = error.strerror if isinstance(error, OSError) else "offset out of range"
        raise ConnectFailed(f"Could not open '{path}': {reason}") from error
    return Channel(fd)


def _bound_address(sock: socket.socket) -> Address:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        if isinstance(name, bytes):
            tight = name[1:].rstrip(b"\0")
            return UnixAddress(os.fsdecode(tight), is_abstract=True, is_tight=name[1:] == tight)
        return UnixAddress(str(name))
    if sock.family == socket.AF_VSOCK:
        return VsockAddress(str(name[0]), str(name[1]))
    return InetAddress(str(name[0]), str(name[1]))

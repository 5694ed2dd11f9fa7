"""The cpr channel: a unix socket over which descriptors pass from one process to another.

The source sends everything and shuts its writing down. The destination closes the socket
when the source may connect the main channel, or when it takes nothing.

Reference: QEMU's cpr-transfer, texts of 11.1.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from migrationd.errors import AddressError, ChannelClosed, ConnectFailed
from migrationd.linux.scm_rights import close_all, recv_with_fds, send_with_fds
from migrationd.transport.address import Address, UnixAddress, describe, unix_target
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener, listen

STATE_WAIT_S = 30.0
"""A source that connected has to send its whole state within this time."""

_PIECE_BYTES = 64 << 10
_FD_MARK = b" "


class CprSender:
    """The source's end.

    Args:
        address: Where the destination listens.

    Raises:
        AddressError: No unix socket.
        ConnectFailed: Nobody listens there.
    """

    def __init__(self, address: Address) -> None:
        self._socket = _connect_now(_unix(address))

    async def hand_over(self, pieces: Sequence[bytes], fds: Sequence[int]) -> None:
        """Send a state, then wait until the destination lets the main channel come.

        Args:
            pieces: What lies between descriptors: one more than there are of these.
            fds: Descriptors; they stay open here.

        Raises:
            ChannelClosed: The destination did not read all of it.
        """
        try:
            for piece, fd in zip(pieces, (*fds, -1), strict=True):
                await self._send(piece, [])
                if fd >= 0:
                    await self._send(_FD_MARK, [fd])
            self._socket.shutdown(socket.SHUT_WR)
            await self._hang_up()
        except OSError as error:
            raise ChannelClosed(
                f"the destination did not take the CPR state: {error.strerror}"
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket, any number of times."""
        self._socket.close()

    async def _send(self, data: bytes, fds: list[int]) -> None:
        while data:
            try:
                done = send_with_fds(self._socket, data, fds)
            except BlockingIOError:
                await _ready(self._socket, is_writing=True)
                continue
            data, fds = data[done:], []

    async def _hang_up(self) -> None:
        while True:
            try:
                if not self._socket.recv(_PIECE_BYTES):
                    return
            except BlockingIOError:
                await _ready(self._socket)


class CprListener:
    """The destination's end: takes one source after the other.

    Args:
        listener: From :func:`listen_cpr`.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._channel: Channel | None = None

    async def receive(self, limit_bytes: int, limit_fds: int) -> tuple[bytes, list[int]]:
        """Wait for a source and take its state; it waits for :meth:`release` then.

        Args:
            limit_bytes: Longest state.
            limit_fds: Most descriptors.

        Returns:
            The state, and descriptors, close-on-exec, which belong to the caller.

        Raises:
            ChannelClosed: It sent too much, or not all of it in time.
            ConnectFailed: The listener was closed.
        """
        self.release()
        while self._channel is None:
            channel = await self._listener.accept()
            if _is_trusted(channel):
                self._channel = channel
            else:
                channel.close()
        try:
            async with asyncio.timeout(STATE_WAIT_S):
                return await _receive(self._channel, limit_bytes, limit_fds)
        except TimeoutError:
            raise ChannelClosed("the source sent no whole CPR state in time") from None

    def release(self) -> None:
        """Let the source go on: it connects the main channel, or finds nobody there."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.shutdown()
            channel.close()

    def close(self) -> None:
        """Stop listening; a source that waits goes on."""
        self.release()
        self._listener.close()


async def listen_cpr(address: Address) -> CprListener:
    """Listen for the cpr channel.

    Raises:
        AddressError: No unix socket.
        ConnectFailed: The path cannot be bound.
    """
    return CprListener(await listen(_unix(address), _no_fds))


def _unix(address: Address) -> UnixAddress:
    if not isinstance(address, UnixAddress):
        raise AddressError("bad cpr channel address; must be unix")
    return address


def _no_fds(name: str) -> int:
    raise AddressError(f"File descriptor named '{name}' has not been found")


def _connect_now(address: UnixAddress) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(unix_target(address))
    except OSError as error:
        sock.close()
        raise ConnectFailed(
            f"Failed to connect to '{describe(address)}': {error.strerror}"
        ) from error
    except AddressError:
        sock.close()
        raise
    return sock


def _is_trusted(channel: Channel) -> bool:
    """Whether the peer is of this user or root: its memory may vanish under our reads."""
    with channel.descriptor() as fd, socket.socket(fileno=os.dup(fd)) as sock:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.unpack("3i", raw)[1] in (0, os.geteuid())


async def _receive(channel: Channel, limit_bytes: int, limit_fds: int) -> tuple[bytes, list[int]]:
    data = bytearray()
    fds: list[int] = []
    with contextlib.ExitStack() as stack:
        on_error = stack.enter_context(contextlib.ExitStack())
        on_error.callback(close_all, fds)
        descriptor = stack.enter_context(channel.descriptor())
        sock = stack.enter_context(socket.socket(fileno=os.dup(descriptor)))
        while True:
            try:
                piece, found = recv_with_fds(sock, _PIECE_BYTES)
            except BlockingIOError:
                await channel.wait_readable()
                continue
            except OSError as error:
                raise ChannelClosed(f"the CPR state: {error.strerror}") from error
            fds += found
            if not piece:
                on_error.pop_all()
                return bytes(data), fds
            data += piece
            if len(data) > limit_bytes or len(fds) > limit_fds:
                raise ChannelClosed(
                    f"a CPR state of more than {limit_bytes} bytes or {limit_fds} descriptors"
                )


async def _ready(sock: socket.socket, *, is_writing: bool = False) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    fd = sock.fileno()
    (loop.add_writer if is_writing else loop.add_reader)(fd, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if is_writing else loop.remove_reader)(fd)

"""Sending without a copy: the kernel reads the memory when the network card does.

A send is numbered by the kernel, from 0; the error queue tells which numbers are done, and
whether the kernel copied after all (as it does over loopback). Until then the memory must not
change, so headers are kept here.

Reference: MSG_ZEROCOPY, ``zero-copy-send``.
"""

import errno
import select
import socket
import struct

import numpy as np
import numpy.typing as npt

from migrationd.errors import ChannelClosed, ConnectFailed
from migrationd.linux.iovec import IOV_MAX, Vector, rest_of, send_vector
from migrationd.transport.channel import Channel

OUTSTANDING_SENDS = 64
"""Sends that may be unfinished at a time."""

KEPT_SENDS = 256
"""Sends whose headers are kept at most."""

_SO_ZEROCOPY = 60
_MSG_ERRQUEUE = 0x2000
_ORIGIN_ZEROCOPY = 5
_CODE_COPIED = 1
_extended_error = struct.Struct("=IBBBBII")
_WAIT_S = 0.5


class ZeroCopySender:
    """Zero-copy sends over one channel; for its sending thread.

    Args:
        channel: A TCP socket.

    Raises:
        ConnectFailed: The socket or the kernel cannot do it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._sent = 0
        self._done = 0
        self._kept: list[npt.NDArray[np.uint8]] = []
        self._has_sent = False
        self._copied_all = True
        try:
            with channel.descriptor() as fd:
                _enable(fd)
        except OSError as error:
            raise ConnectFailed("Zero copy send feature not detected in host kernel") from error

    def send(self, vector: Vector, keep: npt.NDArray[np.uint8]) -> int:
        """Send all of a gather vector.

        Args:
            vector: Addresses and lengths, shape ``(n, 2)``; changed by the call. Guest memory
                in it must not change before :meth:`flush` returns.
            keep: Memory in it that nobody else keeps.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        total = 0
        while len(vector):
            while self._sent - self._done >= OUTSTANDING_SENDS:
                self._reap()
            try:
                part = vector[:IOV_MAX]
                with self._channel.descriptor() as fd:
                    count = send_vector(fd, part, zero_copy=True)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.ENOBUFS and self._sent > self._done:
                    self._reap()
                    continue
                raise ChannelClosed(_text(error)) from error
            total += count
            self._sent += 1
            self._has_sent = True
            vector = rest_of(vector, count)
        self._channel.bytes_sent += total
        self._kept.append(keep)
        if len(self._kept) >= KEPT_SENDS:
            # Completions may come in another order: what is kept goes when all are there.
            self._wait_for_all()
        return total

    def flush(self) -> bool:
        """Wait until the kernel has let go of everything.

        Returns:
            Whether all sends since the last flush were copied after all; False if there were
            none.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        self._wait_for_all()
        missed = self._has_sent and self._copied_all
        self._has_sent, self._copied_all = False, True
        return missed

    def _wait_for_all(self) -> None:
        while self._done < self._sent:
            self._reap()
        self._kept.clear()

    def _reap(self) -> None:
        """Wait for completions and take them."""
        while True:
            try:
                with self._channel.descriptor() as fd:
                    completion = _completion(fd)
            except OSError as error:
                raise ChannelClosed(_text(error)) from error
            if completion is not None:
                break
        first, last, is_copied = completion
        # Numbers are 32 bits and wrap.
        self._done += (last - first & 0xFFFFFFFF) + 1
        self._copied_all = self._copied_all and is_copied


def _enable(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    finally:
        sock.detach()


def _completion(fd: int) -> tuple[int, int, bool] | None:
    """First and last number, and whether they were copied; None if nothing came in time."""
    sock = socket.socket(fileno=fd)
    try:
        try:
            _, ancillary, _, _ = sock.recvmsg(0, 512, _MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, 0)
            for _, events in poll.poll(_WAIT_S * 1000):
                if events & select.POLLHUP:
                    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    raise OSError(number or errno.EPIPE, "the connection ended") from None
            return None
        for _, _, data in ancillary:
            number, origin, _, code, _, info, extra = _extended_error.unpack_from(data)
            if origin == _ORIGIN_ZEROCOPY and not number:
                return info, extra, bool(code & _CODE_COPIED)
        return None
    finally:
        sock.detach()


def _text(error: OSError) -> str:
    if error.errno == errno.ENOBUFS:
        return (
            "Process can't lock enough memory for using MSG_ZEROCOPY; "
            "raise the limit on locked memory"
        )
    return f"Unable to write to socket: {error.strerror}"

"""Descriptors over unix sockets.

Reference: ``SCM_RIGHTS`` of ``unix(7)``. Descriptors travel with the first byte of the
message that they were sent with; the kernel closes what does not fit the buffer.
"""

import contextlib
import os
import socket
import struct

FD_LIMIT = 16
"""Descriptors of one message; as many as QEMU's sockets take."""

_INT_BYTES = struct.calcsize("i")


def recv_with_fds(
    sock: socket.socket, max_bytes: int, max_fds: int = FD_LIMIT
) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them, without waiting.

    Args:
        sock: Unix socket; for other families there are no descriptors.
        max_bytes: Most bytes to take.
        max_fds: Most descriptors to take; further ones are closed.

    Returns:
        Bytes, empty at the end of the input, and descriptors, close-on-exec, which belong
        to the caller.

    Raises:
        BlockingIOError: Nothing is there.
        OSError: As ``recvmsg``.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    space = socket.CMSG_SPACE(max_fds * _INT_BYTES)
    data, ancillary, _, _ = sock.recvmsg(max_bytes, space, flags)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(content) // _INT_BYTES
            fds.extend(struct.unpack_from(f"{count}i", content))
    close_all(fds[max_fds:])
    return data, fds[:max_fds]


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> int:
    """Send bytes with descriptors; they stay open here.

    Args:
        sock: Unix socket.
        data: At least one byte; the descriptors go with the first.
        fds: Descriptors, at most 253.

    Returns:
        Bytes taken by the kernel; when it is not zero, the descriptors went as well.

    Raises:
        BlockingIOError: The socket is non-blocking and takes nothing.
        OSError: As ``sendmsg``.
    """
    content = struct.pack(f"{len(fds)}i", *fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, content)] if fds else []
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)

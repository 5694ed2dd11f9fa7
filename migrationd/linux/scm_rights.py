"""Descriptors that travel with bytes over a unix socket (SCM_RIGHTS)."""

import array
import os
import socket

FDS_PER_MESSAGE = 16
"""Room for this many; the kernel drops the others."""

_FD_BYTES = array.array("i").itemsize


def recv_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them, close-on-exec.

    Raises:
        OSError: As ``recvmsg``; BlockingIOError when nothing is there.
    """
    data, ancillary, _, _ = sock.recvmsg(
        size, socket.CMSG_SPACE(FDS_PER_MESSAGE * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    return data, fds.tolist()


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send bytes with descriptors.

    Raises:
        OSError: As ``sendmsg``.
    """
    payload = array.array("i", fds).tobytes()
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)])


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)

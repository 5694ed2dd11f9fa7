"""Bytes of one file in another, without passing through the process: reflink and offload."""

import ctypes
import errno
import fcntl
import os
import struct

_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")
_CANNOT = (
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
)

_OFFLOADING = frozenset((0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x0BD00BD0))
"""NFS, CIFS, SMB2, Ceph, Lustre: the server copies. Elsewhere ``copy_file_range`` moves the
bytes through the page cache: on ext4 at half the rate of direct writes, and a hundred times
their processor time."""


class _Statfs(ctypes.Structure):
    _fields_ = (("type", ctypes.c_long), ("rest", ctypes.c_char * 256))


_libc = ctypes.CDLL(None, use_errno=True)


def clone_range(source: int, start: int, target: int, position: int, length: int) -> bool:
    """Share a range of one file with another (reflink): no byte is copied.

    Args:
        source: File to take from.
        start: First byte there.
        target: File to put into, open for writing.
        position: Where to.
        length: Bytes; positions and length must be multiples of the file system's block.

    Returns:
        False if these files cannot share; nothing was changed then.

    Raises:
        OSError: The file system failed, ENOSPC for example.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, start, length, position))
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def can_offload(source: int, target: int) -> bool:
    """Whether ``copy_file_range`` is left to a file server, and so cheaper than writing.

    Raises:
        OSError: As ``fstat`` and ``fstatfs``.
    """
    if os.fstat(source).st_dev != os.fstat(target).st_dev:
        return False
    head = _Statfs()
    if _libc.fstatfs(target, ctypes.byref(head)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return (head.type & 0xFFFFFFFF) in _OFFLOADING


def copy_range(source: int, start: int, target: int, position: int, length: int) -> None:
    """``copy_file_range`` of everything.

    Raises:
        OSError: As the call; EIO if the source ends before.
    """
    while length:
        done = os.copy_file_range(source, target, length, start, position)
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        start += done
        position += done
        length -= done

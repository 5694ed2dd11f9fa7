"""Holes in files: give back what reads as zero anyway."""

import ctypes
import errno
import os

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def punch_hole(fd: int, position: int, length: int) -> None:
    """Make a range of a file read as zero and release its disk space.

    Where the file system has no holes, zeros are written instead.

    Args:
        fd: File, open for writing.
        position: First byte.
        length: Bytes, within the file.

    Raises:
        OSError: As ``fallocate`` or ``pwrite``.
    """
    while _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, position, length) < 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number not in _NOT_SUPPORTED:
            raise OSError(number, os.strerror(number))
        write_zeros(fd, position, length)
        return


def write_zeros(fd: int, position: int, length: int) -> None:
    """Write zeros over a range of a file.

    Raises:
        OSError: As ``pwrite``.
    """
    zeros = memoryview(bytes(min(length, 1 << 20)))
    end = position + length
    while position < end:
        position += os.pwrite(fd, zeros[: end - position], position)

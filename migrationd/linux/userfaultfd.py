"""The userfaultfd system call and its ioctls; standard library only, workloads import it.

A process makes one for its own memory and may pass it to another, which can then place
pages and change write protection there.

Reference: ``userfaultfd(2)``, ``ioctl_userfaultfd(2)``.
"""

import ctypes
import errno
import fcntl
import os
import struct

from migrationd.errors import GuestError

FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_THREAD_ID = 1 << 8
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

MODE_WP = 1 << 1

_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_USER_MODE_ONLY = 1
_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00

_libc = ctypes.CDLL(None, use_errno=True)


def open_userfaultfd(features: int) -> int:
    """Make one for the memory of this process, close-on-exec and non-blocking.

    Args:
        features: ``FEATURE_*`` that have to be there.

    Returns:
        The descriptor, which belongs to the caller.

    Raises:
        GuestError: The kernel has none of it, or does not let this user.
    """
    number = _NR_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise GuestError(f"no userfaultfd on {os.uname().machine}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = _libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if fd < 0 and ctypes.get_errno() == errno.EPERM:
        # Faults from inside the kernel are for root; those of the program suffice for most.
        fd = _libc.syscall(ctypes.c_long(number), ctypes.c_long(flags | _USER_MODE_ONLY))
    if fd < 0:
        raise GuestError(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("QQQ", _API, features, 0)))
    except OSError as error:
        os.close(fd)
        raise GuestError(
            f"userfaultfd: the kernel lacks features {features:#x} ({error.strerror})"
        ) from error
    return int(fd)


def register(fd: int, address: int, length: int, mode: int) -> None:
    """Watch a range of the owner's memory.

    Args:
        fd: From :func:`open_userfaultfd`.
        address: Page-aligned.
        length: Bytes, whole pages.
        mode: ``MODE_*``.

    Raises:
        GuestError: The range cannot be watched so.
    """
    _ioctl(fd, _UFFDIO_REGISTER, struct.pack("QQQQ", address, length, mode, 0), "register")


def _ioctl(fd: int, request: int, argument: bytes, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, bytearray(argument))
    except OSError as error:
        raise GuestError(f"userfaultfd: {what}: {error.strerror}") from error

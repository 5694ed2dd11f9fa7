"""The userfaultfd system call and its ioctls; standard library only, workloads import it.

A process makes one for its own memory and may pass it to another, which can then watch
ranges, place pages and change write protection there. When the last descriptor is closed
nothing is watched any more, and whoever waits goes on.

Reference: ``userfaultfd(2)``, ``ioctl_userfaultfd(2)``.
"""

import ctypes
import errno
import fcntl
import os
import struct

from migrationd.errors import GuestError, WorkloadGone

FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_THREAD_ID = 1 << 8
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

ASYNC_TRACKING = (
    FEATURE_WP_ASYNC
    | FEATURE_WP_UNPOPULATED
    | FEATURE_WP_HUGETLBFS_SHMEM
    | FEATURE_MISSING_SHMEM
    | FEATURE_MINOR_SHMEM
    | FEATURE_THREAD_ID
)
"""The kernel itself notes writes, and accesses to missing pages wait; Linux 6.7."""

SYNC_TRACKING = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM
"""Writes to protected pages wait to be served; Linux 5.19."""

MODE_MISSING = 1 << 0
MODE_WP = 1 << 1
MODE_MINOR = 1 << 2

_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_USER_MODE_ONLY = 1
_API = 0xAA
_DEVICE = "/dev/userfaultfd"
_DEVICE_NEW = 0xAA00
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_WRITEPROTECT = 0xC018AA06
_WRITEPROTECT_WP = 1 << 0

_libc = ctypes.CDLL(None, use_errno=True)


def open_userfaultfd(features: int, *, only_user_faults: bool = True) -> int:
    """Make one for the memory of this process, close-on-exec and non-blocking.

    Args:
        features: ``FEATURE_*`` that have to be there.
        only_user_faults: Make do with one that knows nothing of accesses from inside the
            kernel, which fail where they would have to wait. It suffices where nothing waits.

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
        fd = _open_by_device(flags)
    if fd < 0 and ctypes.get_errno() == errno.EPERM and only_user_faults:
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


def can_serve_faults() -> bool:
    """Whether writes of a process of this user can be made to wait, the kernel's own too."""
    try:
        os.close(open_userfaultfd(SYNC_TRACKING, only_user_faults=False))
    except GuestError:
        return False
    return True


def register(fd: int, address: int, length: int, mode: int) -> None:
    """Watch a range of the owner's memory.

    Args:
        fd: From :func:`open_userfaultfd`.
        address: Page-aligned.
        length: Bytes, whole pages.
        mode: ``MODE_*``.

    Raises:
        GuestError: The range cannot be watched so, for example because another one does.
    """
    _ioctl(fd, _UFFDIO_REGISTER, struct.pack("QQQQ", address, length, mode, 0), "register")


def unregister(fd: int, address: int, length: int) -> None:
    """Watch a range no more; nothing in it is protected then.

    Threads that wait for a protected page of it still have to be woken.

    Raises:
        GuestError: The owner is gone, or the range is no memory of one kind.
    """
    _ioctl(fd, _UFFDIO_UNREGISTER, struct.pack("QQ", address, length), "unregister")


def wake(fd: int, address: int, length: int) -> None:
    """Let threads try again that wait for a page of a range.

    Raises:
        GuestError: The owner is gone.
    """
    _ioctl(fd, _UFFDIO_WAKE, struct.pack("QQ", address, length), "wake")


def write_protect(fd: int, address: int, length: int, *, protect: bool) -> None:
    """Protect a range that is watched with ``MODE_WP``, or allow writes and wake their threads.

    Raises:
        GuestError: The owner is gone, or the range is not watched.
    """
    mode = _WRITEPROTECT_WP if protect else 0
    argument = struct.pack("QQQ", address, length, mode)
    while True:
        try:
            _ioctl(fd, _UFFDIO_WRITEPROTECT, argument, "write-protect")
            return
        except GuestError as error:
            # The owner's memory map is just changing.
            if not isinstance(error.__cause__, BlockingIOError):
                raise


def _open_by_device(flags: int) -> int:
    """One from the device file, which may be given to users; -1 and errno if there is none."""
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        ctypes.set_errno(errno.EPERM)
        return -1
    try:
        return int(_libc.ioctl(device, ctypes.c_ulong(_DEVICE_NEW), ctypes.c_long(flags)))
    finally:
        os.close(device)


def _ioctl(fd: int, request: int, argument: bytes, what: str) -> None:
    # Not fcntl.ioctl: it would hold the GIL for as long as the call takes.
    buffer = ctypes.create_string_buffer(argument, len(argument))
    if _libc.ioctl(fd, ctypes.c_ulong(request), buffer) < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise WorkloadGone
        cause = OSError(number, os.strerror(number))
        raise GuestError(f"userfaultfd: {what}: {cause.strerror}") from cause

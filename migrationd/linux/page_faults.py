"""Missing pages of another process: putting them in and waking it.

The memory is shared: a page that is written through another mapping is there at once, but
its owner sees it only when it is mapped to it, which is why it never sees half of one.

    fault: nothing there         COPY or ZERO fill, map and wake in one
    fault: there, not mapped     CONTINUE maps and wakes

Reference: ``ioctl_userfaultfd(2)``; Linux 5.14 and later for shared memory.
"""

import ctypes
import errno
import mmap
import os

from migrationd.errors import GuestError, WorkloadGone

_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_CONTINUE = 0xC020AA07

# Long calls let other threads run; a call for one page is shorter than getting the GIL back.
_long = ctypes.CDLL(None, use_errno=True).ioctl
_short = ctypes.PyDLL(None, use_errno=True).ioctl
for _call in (_long, _short):
    _call.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    _call.restype = ctypes.c_int

_SHORT_BYTES = 16 * mmap.PAGESIZE


class _Range(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    )


class _CopyRange(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    )


def copy_page(fd: int, address: int, source: int, length: int) -> bool:
    """Put a page where none is, map and wake.

    Args:
        fd: A userfaultfd.
        address: Where it goes, in the other process.
        source: Address of its contents, in this one.
        length: Bytes.

    Returns:
        False if there is a page already, which stays as it is.

    Raises:
        GuestError: The process is gone, or there is no memory.
    """
    argument = _CopyRange(address, source, length, 0, 0)
    pointer = ctypes.addressof(argument)
    while _short(fd, _COPY, pointer):
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number != errno.EAGAIN:
            raise _error("copy", number)
    return True


def zero_pages(fd: int, address: int, length: int) -> None:
    """Put zero pages where none are, map and wake; what is there is mapped as it is.

    Raises:
        GuestError: The process is gone, or there is no memory.
    """
    _fill(fd, _ZEROPAGE, address, length, _CONTINUE, "zero pages")


def map_pages(fd: int, address: int, length: int) -> None:
    """Map and wake what was put into shared memory; zero pages where nothing is.

    Raises:
        GuestError: The process is gone, or there is no memory.
    """
    _fill(fd, _CONTINUE, address, length, _ZEROPAGE, "continue")


def map_huge_page(fd: int, address: int, length: int) -> None:
    """Map and wake one huge page of shared memory that is there as a whole.

    Raises:
        GuestError: The process is gone, or the page is not there.
    """
    argument = _Range(address, length, 0, 0)
    pointer = ctypes.addressof(argument)
    while _long(fd, _CONTINUE, pointer):
        number = ctypes.get_errno()
        if number == errno.EEXIST:  # mapped already
            _short(fd, _WAKE, pointer)
            return
        if number != errno.EAGAIN:
            raise _error("continue", number)


def _fill(fd: int, request: int, address: int, length: int, other: int, what: str) -> None:
    """One call for as much as it takes; pages that it does not fit get the other one."""
    end = address + length
    argument = _Range(address, length, 0, 0)
    pointer = ctypes.addressof(argument)
    while address < end:
        argument.start, argument.length, argument.done = address, end - address, 0
        if not _ioctl(fd, request, pointer, end - address):
            return
        number = ctypes.get_errno()
        if argument.done > 0:
            address += argument.done
        elif number == errno.EEXIST and request == _CONTINUE:
            address += mmap.PAGESIZE  # mapped already
        elif number in (errno.EEXIST, errno.EFAULT):
            _settle_page(fd, request, other, address, what)
            address += mmap.PAGESIZE
        elif number != errno.EAGAIN:
            raise _error(what, number)


def _settle_page(fd: int, request: int, other: int, address: int, what: str) -> None:
    """A page that only the other call fits; another thread may change that at any time."""
    argument = _Range(address, mmap.PAGESIZE, 0, 0)
    pointer = ctypes.addressof(argument)
    calls = (other, request)
    for attempt in range(_ATTEMPTS):
        if not _short(fd, calls[attempt % 2], pointer):
            return
        number = ctypes.get_errno()
        is_mapped = number == errno.EEXIST and calls[attempt % 2] == _CONTINUE
        if is_mapped:
            _short(fd, _WAKE, pointer)
            return
        if number not in (errno.EEXIST, errno.EFAULT, errno.EAGAIN):
            raise _error(what, number)
    raise _error(what, errno.EFAULT)


_ATTEMPTS = 64


def _ioctl(fd: int, request: int, pointer: int, length: int) -> int:
    call = _short if length <= _SHORT_BYTES else _long
    return int(call(fd, request, pointer))


def _error(what: str, number: int) -> GuestError:
    if number == errno.ESRCH:
        return WorkloadGone()
    return GuestError(f"userfaultfd: {what}: {os.strerror(number)}")

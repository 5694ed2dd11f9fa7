"""Which pages of another process were written: the PAGEMAP_SCAN call.

Works on memory that is registered with an asynchronous userfaultfd: a scan reports the
pages that were written since they were protected and protects them again, in one step
for each page, so that no write is missed.

Reference: ``Documentation/admin-guide/mm/pagemap.rst``; Linux 6.7 and later.
"""

import ctypes
import errno
import os
import struct

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError, WorkloadGone

_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1 << 0
_PM_SCAN_CHECK_WPASYNC = 1 << 1
_PAGE_IS_WRITTEN = 1 << 1
_PAGE_IS_PRESENT = 1 << 3
_REGIONS = 1 << 15
"""Regions of one call: 768 KiB."""

Regions = npt.NDArray[np.uint64]


class WrittenScanner:
    """Scans one process; used by one thread.

    Args:
        fd: Its ``/proc/PID/pagemap``, not owned.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._regions = np.empty((_REGIONS, 3), np.uint64)

    def scan(self, address: int, length: int, *, protect: bool) -> Regions:
        """Ranges of pages that were written.

        Args:
            address: Where to begin, page-aligned, in the other process.
            length: Bytes, whole pages.
            protect: Protect what is reported again.

        Returns:
            Shape ``(n, 2)``: begin and end address, ascending.

        Raises:
            GuestError: The range is not watched by an asynchronous userfaultfd, the process
                is gone, or the kernel cannot scan.
        """
        flags = _PM_SCAN_CHECK_WPASYNC | (_PM_SCAN_WP_MATCHING if protect else 0)
        return self._scan(address, length, flags, _PAGE_IS_WRITTEN)

    def mapped(self, address: int, length: int) -> Regions:
        """Ranges of pages that the process has mapped: it may look at them without a fault.

        Args:
            address: As for :meth:`scan`.
            length: Likewise.

        Returns:
            As :meth:`scan`.

        Raises:
            GuestError: The process is gone, or the kernel cannot scan.
        """
        return self._scan(address, length, 0, _PAGE_IS_PRESENT)

    def _scan(self, address: int, length: int, flags: int, category: int) -> Regions:
        end = address + length
        found: list[Regions] = []
        vector = self._regions.__array_interface__["data"][0]
        while address < end:
            argument = bytearray(
                struct.pack(
                    "12Q",
                    96,
                    flags,
                    address,
                    end,
                    0,
                    vector,
                    _REGIONS,
                    0,
                    0,
                    category,
                    0,
                    category,
                )
            )
            count = self._call(argument)
            if count:
                found.append(self._regions[:count, :2].copy())
            (walked,) = struct.unpack_from("Q", argument, 32)
            if walked <= address:
                raise GuestError("PAGEMAP_SCAN does not advance")
            address = walked
        return np.concatenate(found) if found else np.empty((0, 2), np.uint64)

    def _call(self, argument: bytearray) -> int:
        # Not fcntl.ioctl: it would hold the GIL for as long as the scan takes.
        buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
        result = _ioctl(self._fd, _PAGEMAP_SCAN, ctypes.addressof(buffer))
        if result < 0:
            if ctypes.get_errno() == errno.ESRCH:
                raise WorkloadGone
            raise GuestError(f"PAGEMAP_SCAN: {os.strerror(ctypes.get_errno())}")
        return int(result)


def can_scan() -> bool:
    """Whether this kernel knows the call."""
    try:
        with open("/proc/self/pagemap", "rb") as file:
            WrittenScanner(file.fileno()).scan(0, 1 << 12, protect=False)
    except (GuestError, OSError):
        return False
    return True


_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int

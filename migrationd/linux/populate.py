"""Touch memory before it is needed."""

import ctypes
import os

_MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise.restype = ctypes.c_int


def populate_write(address: int, length: int) -> None:
    """Let the kernel find memory for a range, as if each page of it had been written.

    What is there stays as it is. Other threads run meanwhile.

    Args:
        address: First byte, at a host page.
        length: Bytes, whole host pages.

    Raises:
        OSError: There is not enough memory, or the kernel is older than Linux 5.14.
    """
    if _madvise(address, length, _MADV_POPULATE_WRITE) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

"""A RAM block of a workload: a memfd and where it is mapped.

The memfd can be replaced by another one while the address stays, so that memory passes
from process to process without being copied. Whoever runs on a memfd holds an exclusive
lock on it: two processes that have the same one cannot both run.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
from enum import Enum

from migrationd.errors import GuestError

_MAP_FIXED = 0x10
_LONGEST_MEMFD_NAME = 249
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)


def huge_page_bytes() -> int:
    """Bytes of a huge page, of the size that is used where none is named.

    Raises:
        GuestError: This kernel has none.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("Hugepagesize:"))
    except (OSError, StopIteration):
        raise GuestError("this kernel has no huge pages") from None
    return int(found.split()[1]) << 10


class Origin(Enum):
    """Whose memory a block has."""

    OWN = "its own, or it has run on it"
    LENT = "another process's, whose state has not come yet"
    CAME = "another process's, whose state was loaded, but which never ran here"


class Block:
    """One block.

    Args:
        name: Unique in the workload.
        size: Bytes, whole pages.
        is_huge: In huge pages of the default size, which somebody has set aside.

    Attributes:
        memory: Where it is mapped; stays valid when the memfd is replaced.
        fd: The memfd; owned.
        origin: Whose memory it is.

    Raises:
        GuestError: There is no memory.
    """

    def __init__(self, name: str, size: int, *, is_huge: bool = False) -> None:
        self.name = name
        self.size = size
        self.origin = Origin.OWN
        self._is_huge = is_huge
        self._lock_fd = -1
        self.fd = self._empty_memfd()
        try:
            self.memory = mmap.mmap(self.fd, size)
        except (OSError, ValueError) as error:
            os.close(self.fd)
            hint = ": are so many huge pages set aside (vm.nr_hugepages)?" if is_huge else ""
            raise GuestError(f"block '{name}' of {size} bytes: {error}{hint}") from error

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def remap(self, fd: int, origin: Origin) -> None:
        """Put another memfd in the place of this one.

        Args:
            fd: Stays the caller's.
            origin: Whose memory it is.

        Raises:
            GuestError: It is too short, or cannot be mapped; nothing has changed.
        """
        try:
            size = os.fstat(fd).st_size
            if size < self.size:
                raise GuestError(f"block '{self.name}' of {self.size} bytes: {size} were handed")
            own = os.dup(fd)
        except OSError as error:
            raise GuestError(f"block '{self.name}': {error.strerror}") from error
        os.set_inheritable(own, False)
        mapped = _mmap(
            self.address,
            self.size,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | _MAP_FIXED,
            own,
            0,
        )
        if mapped == _MAP_FAILED:
            os.close(own)
            raise GuestError(f"block '{self.name}': {os.strerror(ctypes.get_errno())}")
        self.unlock()
        os.close(self.fd)
        self.fd = own
        self.origin = origin

    def renew(self) -> None:
        """Put empty memory in the place of what it has.

        Raises:
            GuestError: There is none.
        """
        fd = self._empty_memfd()
        try:
            self.remap(fd, Origin.OWN)
        finally:
            os.close(fd)

    def lock(self) -> None:
        """Say that this process runs on the memory now.

        Raises:
            GuestError: Another one does.
        """
        if self._lock_fd >= 0:
            return
        # A description of its own: those that share one with the memfd share its locks, too.
        with contextlib.suppress(FileNotFoundError):
            self._lock_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if self._lock_fd >= 0:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.unlock()
            raise GuestError(f"block '{self.name}': another process runs on this memory") from error

    def unlock(self) -> None:
        """Say that this process stands still."""
        if self._lock_fd >= 0:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            os.close(self._lock_fd)
        self._lock_fd = -1

    def _empty_memfd(self) -> int:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if self._is_huge:
            flags |= os.MFD_HUGETLB
        try:
            fd = os.memfd_create(f"migrationd-{self.name}"[:_LONGEST_MEMFD_NAME], flags)
        except (OSError, ValueError) as error:
            raise GuestError(f"block '{self.name}': {error}") from error
        try:
            os.ftruncate(fd, self.size)
            # The daemon maps it too: it must not shrink under its reads.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            os.close(fd)
            raise GuestError(f"block '{self.name}' of {self.size} bytes: {error}") from error
        return fd

"""Memory that passes from one process to another by its descriptors; no page is copied."""

import fcntl
import os
from collections.abc import Sequence

import numpy as np

from migrationd.codec.cpr import CprEntry, CprState
from migrationd.errors import GuestError, StreamCorrupt
from migrationd.guest.memory import (
    AnonymousMemory,
    Pages,
    SharedMemory,
    data_runs,
    page_runs,
    read_whole,
    seal_size,
)
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.iovec import pwrite_rows
from migrationd.linux.scm_rights import close_all

GROWTH_BYTES = 64 << 20
"""Room behind each copied block: a QEMU's may grow, how far it does not tell. It costs nothing."""

_MFD_HUGE_SHIFT = 26


class HandedMemory:
    """Descriptors and what the source says of them.

    Args:
        state: One entry for each descriptor.
        fds: Descriptors, owned from now on.

    Raises:
        StreamCorrupt: There are more or fewer of them; they are closed.
    """

    def __init__(self, state: CprState, fds: Sequence[int]) -> None:
        self.state = state
        self._fds = list(fds)
        if len(fds) != len(state.entries):
            self.close()
            raise StreamCorrupt(
                f"the CPR state announces {len(state.entries)} descriptors, {len(fds)} came"
            )

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors, in the order of the entries."""
        return tuple(self._fds)

    def fd_of_block(self, idstr: str, size: int) -> int:
        """The descriptor of a RAM block; it stays owned here.

        Args:
            idstr: Of the block.
            size: Bytes that it must have at least.

        Raises:
            GuestError: There is none, or it is too short.
        """
        entry = CprEntry(idstr)
        if entry not in self.state.entries:
            raise GuestError(f"RAM block '{idstr}' came without its memory")
        fd = self._fds[self.state.entries.index(entry)]
        try:
            found = os.fstat(fd).st_size
        except OSError as error:
            raise GuestError(f"RAM block '{idstr}': {error.strerror}") from error
        if found < size:
            raise GuestError(f"the memory of RAM block '{idstr}' is {found} bytes, not {size}")
        return fd

    def copy(self) -> "HandedMemory":
        """The same memory by other descriptors.

        Raises:
            GuestError: There are too many descriptors.
        """
        return HandedMemory(self.state, duplicate_all(self._fds))

    def close(self) -> None:
        """Close the descriptors, any number of times."""
        close_all(self._fds)
        self._fds = []


def duplicate_all(fds: Sequence[int]) -> list[int]:
    """The same memory by other descriptors, which belong to the caller.

    Raises:
        GuestError: There are too many descriptors; none is left over.
    """
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError as error:
        close_all(copies)
        raise GuestError(f"handing memory over: {error.strerror}") from error
    return copies


class CopiedMemory(AnonymousMemory):
    """A copy of handed memory, for what its source could take away while it is looked at.

    Args:
        fd: Its descriptor; not owned.
        size: Bytes.
        page_size: Target page size in bytes.

    Raises:
        GuestError: There is no address space for it.
    """

    def __init__(self, fd: int, size: int, page_size: int) -> None:
        super().__init__(size, page_size)
        self._fd = fd

    def take(self) -> None:
        """Copy all of it: whoever ran on it stands still now.

        Raises:
            GuestError: It is not there any more.
        """
        for first, count in (self.data_runs() * self._page_size).tolist():
            into = self.view.data[first : first + count]
            if not read_whole(self._fd, into, first, "handed memory"):
                raise GuestError("the source took memory away that it had handed over")

    def data_runs(self) -> Pages:
        """See :class:`SharedMemory`."""
        return data_runs(self._fd, len(self.view), self._page_size)


def map_handed(fd: int, size: int, page_size: int) -> SharedMemory | CopiedMemory:
    """The memory itself where it cannot shrink, and otherwise what will be a copy of it.

    Args:
        fd: Its descriptor; not owned. A QEMU's may not let itself be sealed.
        size: Bytes.
        page_size: Target page size in bytes.

    Raises:
        GuestError: It cannot be mapped.
    """
    try:
        seal_size(fd)
    except OSError:
        return CopiedMemory(fd, size, page_size)
    return SharedMemory(fd, size, page_size)


def copied_memory(blocks: Sequence[RamBlock]) -> HandedMemory:
    """A copy of a guest's memory that can be handed over; takes as long as memory does.

    Args:
        blocks: All of its blocks; it stands still.

    Raises:
        GuestError: There is no memory for it, or it cannot be read.
    """
    fds: list[int] = []
    try:
        for block in blocks:
            if block.is_elsewhere:
                raise GuestError(f"the memory of RAM block '{block.idstr}' is not here")
            fds.append(empty_memfd(block.idstr, block.used_length + GROWTH_BYTES))
            rows = block.memory.view.reshape(-1, block.page_size)
            for first, count in page_runs(np.flatnonzero(block.present)).tolist():
                pwrite_rows(fds[-1], rows[first : first + count], first * block.page_size)
    except OSError as error:
        close_all(fds)
        raise GuestError(f"copying memory to hand it over: {error.strerror}") from error
    except BaseException:
        close_all(fds)
        raise
    return HandedMemory(CprState(tuple(CprEntry(block.idstr) for block in blocks)), fds)


def empty_memfd(name: str, size: int, huge_page_bytes: int | None = None) -> int:
    """A memfd of zeros that neither shrinks nor grows; it belongs to the caller.

    Args:
        name: For people.
        size: Bytes.
        huge_page_bytes: Of the pages that it is made of; None for those of the host.

    Raises:
        GuestError: The kernel has none.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_page_bytes is not None:
        flags |= os.MFD_HUGETLB | (huge_page_bytes.bit_length() - 1) << _MFD_HUGE_SHIFT
    try:
        fd = os.memfd_create(f"migrationd-{name}"[:200], flags)
    except OSError as error:
        raise GuestError(f"a memfd: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise GuestError(f"a memfd of {size} bytes: {error.strerror}") from error
    return fd

"""Scatter/gather system calls over NumPy-made vectors: no Python object per page.

Each call releases the GIL. A vector is an array of shape ``(n, 2)``, ``uint64``:
address and length, the kernel's ``struct iovec``.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError

IOV_MAX = 1024
"""Entries that the kernel takes in one call."""

Vector = npt.NDArray[np.uint64]

_libc = ctypes.CDLL(None, use_errno=True)
_MSG_NOSIGNAL = 0x4000
_MSG_DONTWAIT = 0x40
_MSG_WAITALL = 0x100
_MSG_ZEROCOPY = 0x4000000


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_sendmsg = _libc.sendmsg
_sendmsg.argtypes = (ctypes.c_int, ctypes.POINTER(_Msghdr), ctypes.c_int)
_sendmsg.restype = ctypes.c_ssize_t
_recvmsg = _libc.recvmsg
_recvmsg.argtypes = (ctypes.c_int, ctypes.POINTER(_Msghdr), ctypes.c_int)
_recvmsg.restype = ctypes.c_ssize_t
_recv_now = ctypes.PyDLL(None, use_errno=True).recv
_recv_now.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv_now.restype = ctypes.c_ssize_t
_writev = _libc.writev
_writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev.restype = ctypes.c_ssize_t
_pwritev = _libc.pwritev
_pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_pwritev.restype = ctypes.c_ssize_t
_process_vm_readv = _libc.process_vm_readv
_process_vm_writev = _libc.process_vm_writev
for _call in (_process_vm_readv, _process_vm_writev):
    _call.argtypes = (
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
    )
    _call.restype = ctypes.c_ssize_t


def address_of(array: npt.NDArray[np.uint8]) -> int:
    """Address of an array's first byte; valid while the array lives."""
    return cast("int", array.__array_interface__["data"][0])


def page_vector(
    headers: npt.NDArray[np.uint8],
    memory: npt.NDArray[np.uint8],
    pages: npt.NDArray[np.int64],
    page_size: int,
) -> Vector:
    """A vector that interleaves headers with pages of a mapped memory.

    Args:
        headers: One header per page, shape ``(n, h)``, contiguous.
        memory: Whole mapped block, one dimension.
        pages: Page numbers, shape ``(n,)``; must lie in ``memory``.
        page_size: Bytes of a page.

    Returns:
        Shape ``(2 n, 2)``: header, page, header, page, ...

    Raises:
        ValueError: A page does not lie in the memory, or an array is not contiguous.
    """
    count, width = headers.shape
    if not headers.flags.c_contiguous or not memory.flags.c_contiguous or count != len(pages):
        raise ValueError("headers and memory must be contiguous, with one header for each page")
    if count and not (int(pages.min()) >= 0 and int(pages.max()) < len(memory) // page_size):
        raise ValueError("a page does not lie in the memory")
    vector = np.empty((count, 2, 2), np.uint64)
    vector[:, 0, 0] = np.arange(count, dtype=np.uint64) * np.uint64(width) + np.uint64(
        address_of(headers)
    )
    vector[:, 0, 1] = width
    vector[:, 1, 0] = (pages * page_size).astype(np.uint64) + np.uint64(address_of(memory))
    vector[:, 1, 1] = page_size
    return vector.reshape(2 * count, 2)


def run_vector(
    memory: npt.NDArray[np.uint8],
    pages: npt.NDArray[np.int64],
    page_size: int,
) -> Vector:
    """A vector of pages of a mapped memory, one entry for each run of consecutive ones.

    Args:
        memory: Whole mapped block, one dimension.
        pages: Page numbers, shape ``(n,)``, n at least 1; must lie in ``memory``.
        page_size: Bytes of a page.

    Returns:
        Shape ``(runs, 2)``.

    Raises:
        ValueError: A page does not lie in the memory, or it is not contiguous.
    """
    _check(memory, int(pages.min()), int(pages.max()), page_size)
    return _runs(memory, pages, page_size, np.diff(pages) != 1)


def packet_vector(
    headers: npt.NDArray[np.uint8],
    memory: npt.NDArray[np.uint8],
    pages: npt.NDArray[np.int64],
    page_size: int,
    packet_pages: int,
) -> Vector:
    """A vector of packets: a header, then ``packet_pages`` pages, each run of them one entry.

    Args:
        headers: One header per packet, shape ``(k, h)``, contiguous.
        memory: Whole mapped block, one dimension.
        pages: Page numbers, ascending, shape ``(n,)``, n at least 1; must lie in ``memory``.
        page_size: Bytes of a page.
        packet_pages: Pages of each packet; the last one has the rest.

    Returns:
        Shape ``(k + runs, 2)``.

    Raises:
        ValueError: A page does not lie in the memory, or an array is not contiguous.
    """
    count, packets = len(pages), len(headers)
    if not headers.flags.c_contiguous or packets != -(-count // packet_pages):
        raise ValueError("headers must be contiguous, with one for each packet")
    first, last = int(pages[0]), int(pages[-1])
    _check(memory, first, last, page_size)
    vector = np.empty((packets, 2, 2), np.uint64)
    steps = np.arange(packets, dtype=np.uint64)
    vector[:, 0, 0] = steps * np.uint64(headers.shape[1]) + np.uint64(address_of(headers))
    vector[:, 0, 1] = headers.shape[1]
    if last - first == count - 1:
        stride = packet_pages * page_size
        start = address_of(memory) + first * page_size
        vector[:, 1, 0] = steps * np.uint64(stride) + np.uint64(start)
        vector[:, 1, 1] = stride
        vector[-1, 1, 1] = (count - (packets - 1) * packet_pages) * page_size
        return vector.reshape(2 * packets, 2)
    is_cut = np.diff(pages) != 1
    is_cut[packet_pages - 1 :: packet_pages] = True
    data = _runs(memory, pages, page_size, is_cut)
    before = np.concatenate(([0], np.cumsum(data[:, 1])[:-1])) // page_size
    return np.insert(
        data, np.searchsorted(before, np.arange(0, count, packet_pages)), vector[:, 0], axis=0
    )


def _check(memory: npt.NDArray[np.uint8], first: int, last: int, page_size: int) -> None:
    if not memory.flags.c_contiguous:
        raise ValueError("the memory must be contiguous")
    if first < 0 or last >= len(memory) // page_size:
        raise ValueError("a page does not lie in the memory")


def _runs(
    memory: npt.NDArray[np.uint8],
    pages: npt.NDArray[np.int64],
    page_size: int,
    is_cut: npt.NDArray[np.bool_],
) -> Vector:
    cuts = np.flatnonzero(is_cut) + 1
    bounds = np.concatenate(([0], cuts, [len(pages)]))
    vector = np.empty((len(cuts) + 1, 2), np.uint64)
    vector[:, 0] = (pages[bounds[:-1]] * page_size).astype(np.uint64)
    vector[:, 0] += np.uint64(address_of(memory))
    vector[:, 1] = np.diff(bounds) * page_size
    return vector


def joined(vector: Vector) -> Vector:
    """The same bytes with neighbouring entries made one; entries without bytes are left out."""
    vector = vector[vector[:, 1] > 0]
    if len(vector) < 2:
        return vector
    ends = vector[:, 0] + vector[:, 1]
    firsts = np.concatenate(([0], np.flatnonzero(vector[1:, 0] != ends[:-1]) + 1))
    result = np.empty((len(firsts), 2), np.uint64)
    result[:, 0] = vector[firsts, 0]
    result[:, 1] = np.add.reduceat(vector[:, 1], firsts)
    return result


def head_of(vector: Vector, size: int) -> Vector:
    """The entries of the first ``size`` bytes of a vector that has at least as many."""
    ends = np.cumsum(vector[:, 1])
    last = int(np.searchsorted(ends, size))
    head = vector[: last + 1].copy()
    head[last, 1] -= ends[last] - np.uint64(size)
    return head


def view_of(address: int, size: int) -> memoryview:
    """A view of memory of this process; who asks keeps that memory alive."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def gather(vector: Vector, into: npt.NDArray[np.uint8]) -> None:
    """Copy what a vector points to, one entry behind the other, into an array of its size.

    Raises:
        GuestError: Some of it is of a mapped file that was cut short.
    """
    _copy_own(_process_vm_readv, vector, into, is_gather=True)


def scatter(data: npt.NDArray[np.uint8], vector: Vector) -> None:
    """Copy an array to where a vector of its size points; raises as :func:`gather`."""
    _copy_own(_process_vm_writev, vector, data, is_gather=False)


def _copy_own(
    call: Callable[..., int], vector: Vector, flat: npt.NDArray[np.uint8], *, is_gather: bool
) -> None:
    """One system call for up to ``IOV_MAX`` entries, instead of a Python call for each."""
    address = address_of(flat)
    for start in range(0, len(vector), IOV_MAX):
        part = np.ascontiguousarray(vector[start : start + IOV_MAX])
        size = int(part[:, 1].sum())
        ours = np.array([[address, size]], np.uint64)
        pointers = (ours.__array_interface__["data"][0], part.__array_interface__["data"][0])
        done = call(os.getpid(), pointers[0], 1, pointers[1], len(part), 0)
        if done < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
            # Some sandboxes do not have the call.
            _copy_each(part, address, is_gather=is_gather)
        elif done != size:
            # Behind a mapped file's new end: a look at it would end this process.
            raise GuestError("memory that was to be copied was taken away")
        address += size


def _copy_each(part: Vector, address: int, *, is_gather: bool) -> None:
    for other, size in part.tolist():
        ctypes.memmove(address if is_gather else other, other if is_gather else address, size)
        address += size


def rest_of(vector: Vector, done: int) -> Vector:
    """What is left of a vector after ``done`` bytes.

    Args:
        vector: Addresses and lengths; the entry that was done in part is changed in place.
        done: Bytes of the vector that are done, at most all.

    Returns:
        A view of the entries that are left; entries without bytes are skipped.
    """
    ends = np.cumsum(vector[:, 1])
    first = int(np.searchsorted(ends, done, side="right"))
    rest = vector[first:]
    if len(rest):
        begin = int(ends[first]) - int(vector[first, 1])
        rest[0, 0] += np.uint64(done - begin)
        rest[0, 1] -= np.uint64(done - begin)
    return rest


def recv_vector(fd: int, vector: Vector) -> int:
    """``recvmsg`` into up to ``IOV_MAX`` entries, without waiting.

    Returns:
        Bytes received; 0 at the end of the input.

    Raises:
        OSError: As the call; BlockingIOError when nothing is there.
    """
    head = _Msghdr(iov=vector.__array_interface__["data"][0], iovlen=min(len(vector), IOV_MAX))
    return _result(_recvmsg(fd, ctypes.byref(head), _MSG_DONTWAIT))


def recv_now(fd: int, address: int, size: int) -> int:
    """``recv`` without waiting, and without letting other threads run meanwhile.

    For little: what is urgent has to wait to get the interpreter back, longer than this takes.

    Returns:
        Bytes received; 0 at the end of the input, -1 when nothing is there.

    Raises:
        OSError: As the call.
    """
    count = int(_recv_now(fd, address, size, _MSG_DONTWAIT))
    if count < 0 and ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
        return -1
    return _result(count)


def recv_vector_all(fd: int, vector: Vector) -> int:
    """``recvmsg`` that waits until up to ``IOV_MAX`` entries are full.

    Returns:
        Bytes received; fewer than asked for at the end of the input or after a signal.

    Raises:
        OSError: As the call.
    """
    head = _Msghdr(iov=vector.__array_interface__["data"][0], iovlen=min(len(vector), IOV_MAX))
    return _result(_recvmsg(fd, ctypes.byref(head), _MSG_WAITALL))


class Window:
    """Two places that a call fills one behind the other: one that changes, one that stays.

    Everything that the call takes is made once: for calls of which each counts.

    Args:
        tail: Address and length of the second one.
    """

    def __init__(self, tail: tuple[int, int]) -> None:
        self._entries = (ctypes.c_uint64 * 4)(0, 0, *tail)
        self._head = _Msghdr(iov=ctypes.addressof(self._entries), iovlen=2)
        self._pointer = ctypes.byref(self._head)

    def aim(self, address: int, length: int) -> None:
        """Set the first place."""
        self._entries[0] = address
        self._entries[1] = length

    def receive(self, fd: int) -> int:
        """:func:`recv_vector_all` into both places; returns and raises the same."""
        return _result(_recvmsg(fd, self._pointer, _MSG_WAITALL))

    def vector(self) -> Vector:
        """A vector of both places."""
        return np.array(self._entries, np.uint64).reshape(2, 2)


def send_entries(fd: int, address: int, count: int) -> int:
    """``sendmsg`` of a vector whose address is known; for short ones, where finding it counts.

    Args:
        fd: Socket.
        address: Of the first entry.
        count: Entries, at most ``IOV_MAX``.

    Returns:
        Bytes taken by the kernel.

    Raises:
        OSError: As the call.
    """
    return _result(_sendmsg(fd, ctypes.byref(_Msghdr(iov=address, iovlen=count)), _MSG_NOSIGNAL))


def send_vector(fd: int, vector: Vector, *, zero_copy: bool = False) -> int:
    """``sendmsg`` of up to ``IOV_MAX`` entries.

    Args:
        fd: Socket.
        vector: What is sent.
        zero_copy: The kernel may go on reading the memory after the call.

    Returns:
        Bytes taken by the kernel.

    Raises:
        OSError: As the call.
    """
    head = _Msghdr(iov=vector.__array_interface__["data"][0], iovlen=min(len(vector), IOV_MAX))
    flags = _MSG_NOSIGNAL | (_MSG_ZEROCOPY if zero_copy else 0)
    return _result(_sendmsg(fd, ctypes.byref(head), flags))


def write_vector(fd: int, vector: Vector) -> int:
    """``writev`` of up to ``IOV_MAX`` entries; returns and raises as :func:`send_vector`."""
    return _result(_writev(fd, vector.__array_interface__["data"][0], min(len(vector), IOV_MAX)))


def pwrite_rows(fd: int, rows: npt.NDArray[np.uint8], position: int) -> None:
    """Write the rows of a strided array one behind the other at a file position.

    Args:
        fd: File.
        rows: Shape ``(n, width)``; each row contiguous, rows at any distance, backwards too.
        position: Where the first row goes, bytes.

    Raises:
        OSError: As ``pwritev``; ENOSPC if the file takes nothing more.
        ValueError: A row is not contiguous.
    """
    count, width = rows.shape
    if count and rows.strides[1] != 1:
        raise ValueError("each row must be contiguous")
    vector = np.empty((count, 2), np.uint64)
    vector[:, 0] = np.arange(count) * rows.strides[0] + address_of(rows)
    vector[:, 1] = width
    while len(vector):
        part = vector[:IOV_MAX]
        try:
            done = _result(_pwritev(fd, part.__array_interface__["data"][0], len(part), position))
        except InterruptedError:
            continue
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        position += done
        vector = rest_of(vector, done)


def _result(value: int) -> int:
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return value

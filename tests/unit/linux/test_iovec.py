import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from migrationd.errors import GuestError
from migrationd.linux import iovec
from migrationd.linux.iovec import (
    address_of,
    gather,
    packet_vector,
    page_vector,
    pwrite_rows,
    recv_now,
    rest_of,
    run_vector,
    write_vector,
)

PAGE = 16

Bytes = npt.NDArray[np.uint8]


def memory_of(pages: int = 8) -> Bytes:
    return np.arange(pages * PAGE, dtype=np.uint64).astype(np.uint8)


def headers_of(count: int) -> Bytes:
    return (np.arange(count * 8, dtype=np.uint64) + 128).astype(np.uint8).reshape(count, 8)


def expected(headers: Bytes, memory: Bytes, pages: npt.NDArray[np.int64]) -> bytes:
    rows = memory.reshape(-1, PAGE)
    return b"".join(headers[i].tobytes() + rows[page].tobytes() for i, page in enumerate(pages))


def flat(vector: iovec.Vector) -> bytes:
    """What a vector points to."""
    read_end, write_end = os.pipe()
    try:
        size = int(vector[:, 1].sum())
        if len(vector):
            assert write_vector(write_end, vector) == size
        return os.read(read_end, size) if size else b""
    finally:
        os.close(read_end)
        os.close(write_end)


def test_headers_and_pages_interleave() -> None:
    memory, headers = memory_of(), headers_of(3)
    pages = np.array([5, 0, 7], np.int64)
    vector = page_vector(headers, memory, pages, PAGE)
    assert vector.shape == (6, 2)
    assert flat(vector) == expected(headers, memory, pages)


def test_no_pages() -> None:
    vector = page_vector(headers_of(0), memory_of(), np.empty(0, np.int64), PAGE)
    assert vector.shape == (0, 2)
    assert len(rest_of(vector, 0)) == 0


@pytest.mark.parametrize("pages", [[8], [-1], [0, 1 << 40]])
def test_a_page_outside_the_memory_is_refused(pages: list[int]) -> None:
    with pytest.raises(ValueError, match="does not lie in the memory"):
        page_vector(headers_of(len(pages)), memory_of(), np.array(pages, np.int64), PAGE)


def test_arrays_must_be_contiguous() -> None:
    pages = np.array([0, 1], np.int64)
    with pytest.raises(ValueError, match="contiguous"):
        page_vector(headers_of(4)[::2], memory_of(), pages, PAGE)
    with pytest.raises(ValueError, match="contiguous"):
        page_vector(headers_of(2), memory_of(16)[::2], pages, PAGE)
    with pytest.raises(ValueError, match="one header for each page"):
        page_vector(headers_of(3), memory_of(), pages, PAGE)


def test_the_rest_after_every_number_of_bytes() -> None:
    memory, headers = memory_of(), headers_of(3)
    pages = np.array([2, 1, 6], np.int64)
    whole = expected(headers, memory, pages)
    for done in range(len(whole) + 1):
        rest = rest_of(page_vector(headers, memory, pages, PAGE), done)
        assert flat(rest) == whole[done:]


def test_the_rest_in_every_pair_of_steps() -> None:
    memory, headers = memory_of(), headers_of(2)
    pages = np.array([3, 4], np.int64)
    whole = expected(headers, memory, pages)
    for first in range(len(whole) + 1):
        for second in range(len(whole) - first + 1):
            rest = rest_of(page_vector(headers, memory, pages, PAGE), first)
            assert flat(rest_of(rest, second)) == whole[first + second :]


def test_entries_without_bytes_are_skipped() -> None:
    data = np.frombuffer(b"abcd", np.uint8)
    vector = np.array([[address_of(data), 0], [address_of(data), 4]], np.uint64)
    assert flat(rest_of(vector, 0)) == b"abcd"


def test_a_call_takes_iov_max_entries() -> None:
    data = np.frombuffer(b"x", np.uint8)
    vector = np.tile(np.array([[address_of(data), 1]], np.uint64), (iovec.IOV_MAX + 5, 1))
    read_end, write_end = os.pipe()
    try:
        assert write_vector(write_end, vector) == iovec.IOV_MAX
    finally:
        os.close(read_end)
        os.close(write_end)


def test_an_error_carries_its_number() -> None:
    data = np.frombuffer(b"x", np.uint8)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        write_vector(-1, np.array([[address_of(data), 1]], np.uint64))
    assert caught.value.errno == errno.EBADF


@pytest.fixture
def file_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_strided_rows_go_to_a_file(file_fd: int) -> None:
    stream = np.arange(3000 * 24, dtype=np.uint64).astype(np.uint8).reshape(3000, 24)
    pwrite_rows(file_fd, stream[:, 8:], 100)
    assert os.pread(file_fd, 1 << 20, 100) == stream[:, 8:].tobytes()
    assert os.pread(file_fd, 100, 0) == bytes(100)


def test_rows_in_short_writes(file_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.arange(5 * 24, dtype=np.uint64).astype(np.uint8).reshape(5, 24)
    true_call = iovec._pwritev
    for most in range(1, 17):

        def short(fd: int, address: int, count: int, position: int, most: int = most) -> int:
            entry = (ctypes.c_uint64 * 2).from_address(address)
            part = np.array([[entry[0], min(entry[1], most)]], np.uint64)
            return int(true_call(fd, part.ctypes.data, 1, position))

        monkeypatch.setattr(iovec, "_pwritev", short)
        os.ftruncate(file_fd, 0)
        pwrite_rows(file_fd, stream[:, 8:], 7)
        assert os.pread(file_fd, 1 << 16, 7) == stream[:, 8:].tobytes()


def test_a_full_device_ends_the_rows() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left on device"):
            pwrite_rows(fd, np.zeros((2, 8), np.uint8), 0)
    finally:
        os.close(fd)


def test_no_rows(file_fd: int) -> None:
    pwrite_rows(file_fd, np.empty((0, 8), np.uint8), 0)
    assert os.fstat(file_fd).st_size == 0


def test_rows_must_be_contiguous(file_fd: int) -> None:
    with pytest.raises(ValueError, match="row"):
        pwrite_rows(file_fd, np.zeros((4, 8), np.uint8)[:, ::2], 0)


def test_rows_may_go_backwards(file_fd: int) -> None:
    rows = np.arange(32, dtype=np.uint8).reshape(4, 8)
    pwrite_rows(file_fd, rows[::-1], 0)
    assert os.pread(file_fd, 64, 0) == rows[::-1].tobytes()


def test_what_is_there_is_received_without_waiting() -> None:
    here, there = socket.socketpair()
    into = np.zeros(8, np.uint8)
    with here, there:
        assert recv_now(here.fileno(), address_of(into), 8) == -1
        there.sendall(b"abc")
        assert recv_now(here.fileno(), address_of(into), 8) == 3
        assert into.tobytes() == b"abc".ljust(8, b"\0")
        there.close()
        assert recv_now(here.fileno(), address_of(into), 8) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        recv_now(here.fileno(), address_of(into), 8)


def test_packets_hold_their_header_and_their_runs() -> None:
    memory = np.arange(64 * 16, dtype=np.uint32).view(np.uint8)[: 64 * 16].copy()
    pages = np.array([3, 4, 5, 6, 7, 9, 11, 12, 20], np.int64)
    headers = np.frombuffer(b"aaabbbccc", np.uint8).reshape(3, 3)
    vector = packet_vector(headers, memory, pages, 16, 4)
    read = b"".join(
        ctypes.string_at(int(address), int(length)) for address, length in vector.tolist()
    )
    content = memory.reshape(-1, 16)
    expected = b""
    for header, part in zip((b"aaa", b"bbb", b"ccc"), np.split(pages, [4, 8]), strict=True):
        expected += header + content[part].tobytes()
    assert read == expected
    # 3..6 | 7, 9, 11..12 | 20
    assert vector[:, 1].tolist() == [3, 64, 3, 16, 16, 32, 3, 16]


def test_packets_of_consecutive_pages_are_two_entries_each() -> None:
    memory = np.zeros(64 * 16, np.uint8)
    headers = np.zeros((3, 5), np.uint8)
    vector = packet_vector(headers, memory, np.arange(10, 20), 16, 4)
    assert vector[:, 1].tolist() == [5, 64, 5, 64, 5, 32]


def test_a_page_outside_the_memory_is_no_packet() -> None:
    memory = np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match="does not lie"):
        run_vector(memory, np.array([4]), 16)


def test_what_lies_behind_the_end_of_a_mapped_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE), np.uint8)
        file.truncate(mmap.PAGESIZE)
    into = np.empty(2 * mmap.PAGESIZE, np.uint8)
    vector = np.array([[address_of(mapped), mapped.size]], np.uint64)
    with pytest.raises(GuestError, match="taken away"):
        gather(vector, into)

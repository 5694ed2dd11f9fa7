import errno
import os
from pathlib import Path

import pytest

from migrationd.linux import sparse


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"\xaa" * (3 << 20))
    return path


def check_middle_is_zero(path: Path) -> None:
    data = path.read_bytes()
    assert data == b"\xaa" * 4096 + bytes((2 << 20) + 4096) + b"\xaa" * ((1 << 20) - 8192)


def test_a_punched_range_reads_as_zero_and_the_size_stays(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    sparse.punch_hole(fd, 4096, (2 << 20) + 4096)
    os.close(fd)
    check_middle_is_zero(path)


def test_zeros_are_written_where_there_are_no_holes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> int:
        sparse.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(sparse, "_fallocate", refuse)
    fd = os.open(path, os.O_RDWR)
    sparse.punch_hole(fd, 4096, (2 << 20) + 4096)
    os.close(fd)
    check_middle_is_zero(path)


def test_other_errors_are_raised(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sparse.punch_hole(fd, 0, 4096)
    os.close(fd)

import errno
import os
from pathlib import Path

import pytest

from migrationd.linux.clone import can_offload, clone_range, copy_range

SIZE = 1 << 20


def files(tmp_path: Path) -> tuple[int, int]:
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    os.pwrite(source, os.urandom(SIZE), 0)
    return source, os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)


def test_a_clone_is_equal_or_nothing_was_done(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    if clone_range(source, 4096, target, 8192, SIZE - 4096):
        assert os.pread(target, SIZE, 8192) == os.pread(source, SIZE, 4096)
    else:
        assert os.fstat(target).st_size == 0


def test_files_of_different_kinds_cannot_share(tmp_path: Path) -> None:
    source, _ = files(tmp_path)
    memory = os.memfd_create("m")
    assert not clone_range(source, 0, memory, 0, SIZE)
    assert not can_offload(source, memory)


def test_a_local_file_system_offloads_nothing(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    assert not can_offload(source, target)


def test_copy_range_copies_all_and_notices_the_end(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    copy_range(source, 4096, target, 100, SIZE - 4096)
    assert os.pread(target, SIZE, 100) == os.pread(source, SIZE, 4096)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        copy_range(source, 0, target, 0, SIZE + 1)

import os
from pathlib import Path

import pytest

from migrationd.errors import GuestError
from migrationd.guest.guest_file import GuestFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    os.utime(file, (1, 1))
    return file


def open_guest_file(path: Path) -> GuestFile:
    with path.open("rb") as file:
        return GuestFile(file.fileno())


@pytest.mark.parametrize("change", ["write", "truncate", "grow"])
def test_a_change_is_noticed(path: Path, change: str) -> None:
    file = open_guest_file(path)
    file.check_unchanged()
    with path.open("r+b") as other:
        if change == "write":
            other.write(b"x")
        else:
            other.truncate(4096 if change == "truncate" else 1 << 20)
    with pytest.raises(GuestError, match="was changed while the guest was held"):
        file.check_unchanged()
    file.close()


def test_another_name_and_a_removed_name_are_no_changes(path: Path) -> None:
    file = open_guest_file(path)
    (path.parent / "other").hardlink_to(path)
    path.unlink()
    file.check_unchanged()
    status = os.stat(path.parent / "other")
    assert file.identity == (status.st_dev, status.st_ino)
    file.close()


def test_it_is_closed_once(path: Path) -> None:
    file = open_guest_file(path)
    fd = file.fd
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(GuestError, match="Bad file descriptor"):
        file.check_unchanged()

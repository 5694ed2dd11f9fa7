"""Sets of descriptors and the files that they stand for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.errors import ConnectFailed, QMPError
from migrationd.transport import connect, fdset, listen
from migrationd.transport.address import FileAddress
from migrationd.transport.fdset import FdSets, open_file


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Iterator[FdSets]:
    sets = FdSets()
    monkeypatch.setattr(fdset, "FDSETS", sets)
    yield sets
    sets.close()


def no_fds(name: str) -> int:
    raise AssertionError(name)


def test_numbers_are_the_lowest_free_and_listed_highest_first(sets: FdSets, tmp_path: Path) -> None:
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(5)]
    assert [sets.add(fds[0]), sets.add(fds[1], 2, "x"), sets.add(fds[2], 2)] == [0, 2, 2]
    assert [sets.add(fds[3]), sets.add(fds[4])] == [1, 3]
    assert [(n, [(m.fd, m.opaque) for m in members]) for n, members in sets.items()] == [
        (3, [(fds[4], None)]),
        (2, [(fds[1], "x"), (fds[2], None)]),
        (1, [(fds[3], None)]),
        (0, [(fds[0], None)]),
    ]
    sets.remove(2, fds[1])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[1])
    with pytest.raises(QMPError, match=f"named 'fdset-id:2, fd:{fds[1]}' not found"):
        sets.remove(2, fds[1])
    sets.remove(2)
    with pytest.raises(QMPError, match="named 'fdset-id:2' not found"):
        sets.remove(2, 1)


def test_a_negative_number_closes_the_descriptor(sets: FdSets, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(QMPError, match="'fdset-id' expects a non-negative value"):
        sets.add(fd, -1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_one_with_the_wanted_access_is_opened(sets: FdSets, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"abc")
    read, write = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
    sets.add(read, 7)
    with pytest.raises(ConnectFailed, match="matching flags=0x41"):
        open_file("/dev/fdset/7", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
    sets.add(write, 7)
    fd = open_file("/dev/fdset/7", os.O_WRONLY | os.O_CREAT)
    assert fd not in (read, write)
    sets.remove(7)  # what is open stays so
    os.write(fd, b"xyz")
    os.close(fd)
    assert path.read_bytes() == b"xyz"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/dev/fdset/9", "Failed to find fdset /dev/fdset/9"),
        ("/dev/fdset/", "Could not parse fdset /dev/fdset/"),
        ("/dev/fdset/x", "Could not parse fdset /dev/fdset/x"),
        ("/dev/fdset/1/", "Could not parse fdset /dev/fdset/1/"),
        ("/dev/fdset/4294967296", "Could not parse fdset /dev/fdset/4294967296"),
    ],
)
def test_names_of_no_set(sets: FdSets, path: str, text: str) -> None:
    with pytest.raises(ConnectFailed, match=f"^{text}$"):
        open_file(path, os.O_RDONLY)


async def test_channels_out_and_in_with_an_offset(sets: FdSets, tmp_path: Path) -> None:
    path = tmp_path / "state"
    sets.add(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 1)
    sets.add(os.open(path, os.O_WRONLY), 1)
    sets.add(os.open(path, os.O_RDONLY), 2)
    out = connect.open_now(FileAddress("/dev/fdset/1", 4096), no_fds)
    out.send(memoryview(b"state"))
    out.close()
    assert path.read_bytes() == bytes(4096) + b"state"
    listener = await listen.listen(FileAddress("/dev/fdset/2", 4096), no_fds)
    channel = await listener.accept()
    buffer = bytearray(5)
    assert channel.recv_into(memoryview(buffer), 5) == 5
    assert buffer == b"state"
    channel.close()
    listener.close()

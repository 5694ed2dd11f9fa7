"""Descriptors of requests and of monitors."""

import os

import pytest

from migrationd.errors import QMPError
from migrationd.qmp.fds import FdTable, PassedFds, RequestFds


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def two_fds() -> tuple[int, int]:
    return os.pipe()


def test_a_name_takes_the_first_and_replaces_an_older_one() -> None:
    table = FdTable()
    first, second = two_fds()
    fds = RequestFds(table, PassedFds([first, second]))
    fds.name("migrate")
    fds.name("migrate")
    assert not is_open(first)
    assert fds.take("migrate") == second
    with pytest.raises(QMPError, match="File descriptor named 'migrate' has not been found"):
        fds.take("migrate")
    os.close(second)


def test_refusals_close_the_descriptor() -> None:
    first, second = two_fds()
    os.close(second)
    fds = RequestFds(FdTable(), PassedFds([first]))
    with pytest.raises(QMPError, match="expects a name not starting with a digit"):
        fds.name("1a")
    assert not is_open(first)
    with pytest.raises(QMPError, match="No file descriptor supplied via SCM_RIGHTS"):
        fds.name("a")
    with pytest.raises(QMPError, match="File descriptor named 'a' not found"):
        fds.close("a")


def test_the_empty_name_is_a_name() -> None:
    table = FdTable()
    first, second = two_fds()
    os.close(second)
    fds = RequestFds(table, PassedFds([first]))
    fds.name("")
    fds.close("")
    assert not is_open(first)


def test_what_nobody_claims_is_closed_with_the_last_holder() -> None:
    first, second = two_fds()
    passed = PassedFds([first, second])
    passed.hold()
    passed.release()
    assert is_open(first)
    passed.release()
    assert not is_open(first)
    assert not is_open(second)


def test_the_table_closes_what_is_left() -> None:
    table = FdTable()
    first, second = two_fds()
    os.close(second)
    table.name("a", PassedFds([first]))
    table.close_all()
    assert not is_open(first)

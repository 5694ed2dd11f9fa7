"""Descriptors: of a monitor by name, and of the process in sets."""

from migrationd.qmp.command import Invocation
from migrationd.qmp.models.control import FdName
from migrationd.qmp.models.fds import AddFd, AddfdInfo, FdsetFdInfo, FdsetInfo, RemoveFd
from migrationd.transport.fdset import FDSETS


def getfd(call: Invocation, arguments: FdName) -> None:
    """``getfd``."""
    call.fds.name(arguments.fdname)


def closefd(call: Invocation, arguments: FdName) -> None:
    """``closefd``."""
    call.fds.close(arguments.fdname)


def add_fd(call: Invocation, arguments: AddFd) -> AddfdInfo:
    """``add-fd``."""
    fd = call.fds.claim()
    fdset_id = FDSETS.add(fd, arguments.fdset_id, arguments.opaque)
    return AddfdInfo.make(fdset_id=fdset_id, fd=fd)


def remove_fd(call: Invocation, arguments: RemoveFd) -> None:
    """``remove-fd``."""
    FDSETS.remove(arguments.fdset_id, arguments.fd)


def query_fdsets(call: Invocation, _: object) -> list[FdsetInfo]:
    """``query-fdsets``."""
    return [
        FdsetInfo.make(
            fdset_id=number,
            fds=[FdsetFdInfo.make(fd=member.fd, opaque=member.opaque) for member in members],
        )
        for number, members in FDSETS.items()
    ]

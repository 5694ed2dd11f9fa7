"""Descriptors that a monitor's clients passed, by the names they were given.

Reference: ``getfd``, ``closefd`` and ``SCM_RIGHTS`` on a QMP socket.
"""

import os

from migrationd.errors import QMPError


class PassedFds:
    """Descriptors that came with one piece of input; closed when nobody can claim them.

    Args:
        fds: They belong to this object now.
    """

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._holders = 1

    def hold(self) -> "PassedFds":
        """Keep them for one more request."""
        self._holders += 1
        return self

    def release(self) -> None:
        """Close what nobody claimed, when this was the last holder."""
        self._holders -= 1
        if self._holders == 0:
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def claim(self) -> int:
        """Take the first one away.

        Raises:
            QMPError: There is none.
        """
        if not self._fds:
            raise QMPError("No file descriptor supplied via SCM_RIGHTS")
        return self._fds.pop(0)


class FdTable:
    """Named descriptors of one monitor; they outlive its clients, as in QEMU."""

    def __init__(self) -> None:
        self._named: dict[str, int] = {}

    def name(self, fdname: str, passed: PassedFds) -> None:
        """Give the descriptor that came with ``getfd`` a name; replaces an older one.

        Raises:
            QMPError: None came, or the name looks like a number.
        """
        fd = passed.claim()
        if fdname[:1].isdigit():
            os.close(fd)
            raise QMPError("Parameter 'fdname' expects a name not starting with a digit")
        if fdname in self._named:
            os.close(self._named[fdname])
        self._named[fdname] = fd

    def take(self, fdname: str) -> int:
        """Give a named descriptor away.

        Raises:
            QMPError: There is none.
        """
        try:
            return self._named.pop(fdname)
        except KeyError:
            raise QMPError(f"File descriptor named '{fdname}' has not been found") from None

    def close(self, fdname: str) -> None:
        """Close a named descriptor.

        Raises:
            QMPError: There is none.
        """
        if fdname not in self._named:
            raise QMPError(f"File descriptor named '{fdname}' not found")
        os.close(self._named.pop(fdname))

    def close_all(self) -> None:
        """Close everything; the monitor ends."""
        for fd in self._named.values():
            os.close(fd)
        self._named = {}


class RequestFds:
    """What one request can do with descriptors.

    Args:
        table: The monitor's.
        passed: What came with the request.
    """

    def __init__(self, table: FdTable, passed: PassedFds) -> None:
        self._table = table
        self._passed = passed

    def name(self, fdname: str) -> None:
        """Give the descriptor that came with this request a name."""
        self._table.name(fdname, self._passed)

    def take(self, fdname: str) -> int:
        """Give a named descriptor away; see ``FdTable.take``."""
        return self._table.take(fdname)

    def close(self, fdname: str) -> None:
        """Close a named descriptor; see ``FdTable.close``."""
        self._table.close(fdname)

    def claim(self) -> int:
        """Take the descriptor that came with this request; see ``PassedFds.claim``."""
        return self._passed.claim()

"""Descriptors that a monitor's clients passed, by the names they were given."""

import os

from migrationd.errors import QMPError


class FdStore:
    """Named descriptors of one monitor, and those that came with the current input."""

    def __init__(self) -> None:
        self._named: dict[str, int] = {}
        self._arrived: list[int] = []

    def arrive(self, fds: list[int]) -> None:
        """Take descriptors that came with input; earlier unclaimed ones are closed."""
        if fds:
            self.drop_unclaimed()
            self._arrived = fds

    def drop_unclaimed(self) -> None:
        """Close descriptors that no command asked for."""
        for fd in self._arrived:
            os.close(fd)
        self._arrived = []

    def name(self, fdname: str) -> None:
        """Give the descriptor that came with ``getfd`` a name; replaces an older one.

        Raises:
            QMPError: None came, or the name looks like a number.
        """
        if not self._arrived:
            raise QMPError("No file descriptor supplied via SCM_RIGHTS")
        if fdname[:1].isdigit():
            self.drop_unclaimed()
            raise QMPError("Parameter 'fdname' expects a name not starting with a digit")
        if fdname in self._named:
            os.close(self._named[fdname])
        self._named[fdname] = self._arrived.pop(0)

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
        self.drop_unclaimed()
        for fd in self._named.values():
            os.close(fd)
        self._named = {}

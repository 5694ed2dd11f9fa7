"""The file that a guest's pages are in, while it is held."""

import os
from typing import NamedTuple

from migrationd.errors import GuestError


class _Stamp(NamedTuple):
    size: int
    changed_ns: int


class GuestFile:
    """Keeps a guest's file open and notices when somebody writes to it.

    A guest's pages are mapped, not copied: whoever changes the file changes the guest. That
    cannot be prevented, but a guest that was changed is never sent as if it were whole.

    Args:
        fd: File; duplicated, not owned.

    Attributes:
        fd: An own descriptor of the file, for reading.

    Raises:
        OSError: It cannot be duplicated or looked at.
    """

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        os.set_inheritable(self.fd, False)
        status = os.fstat(self.fd)
        self._identity = (status.st_dev, status.st_ino)
        self._stamp = self._look()

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        return self._identity

    def check_unchanged(self) -> None:
        """Compare with the file as it was.

        Raises:
            GuestError: It was changed, or cannot be looked at.
        """
        try:
            stamp = self._look()
        except OSError as error:
            raise GuestError(f"the guest's file: {error.strerror}") from error
        if stamp != self._stamp:
            raise GuestError(
                "the guest's file was changed while the guest was held: "
                f"{self._stamp.size} bytes then, {stamp.size} bytes now; it is not whole any more"
            )

    def close(self) -> None:
        """Close the descriptor; any number of times."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _look(self) -> _Stamp:
        status = os.fstat(self.fd)
        return _Stamp(status.st_size, status.st_mtime_ns)

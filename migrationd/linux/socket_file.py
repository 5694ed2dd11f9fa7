"""The file of a listening UNIX socket: removed by whoever bound it, and nobody else."""

import contextlib
import os
import stat


class SocketFile:
    """A socket's file; made right after ``bind``, while the socket is open.

    Args:
        path: Where the socket was bound.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._status = _status(path)

    def remove(self) -> None:
        """Remove the file, unless somebody else listens there by now.

        Call it before the socket is closed: as long as it is open no other file can have the
        same inode.
        """
        found = _status(self._path)
        if found is None or self._status is None or not os.path.samestat(found, self._status):
            return
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def remove_stale(path: str) -> None:
    """Make room for a socket where one was left behind; any other file stays, and is in the way."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None

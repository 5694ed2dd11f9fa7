"""Sets of descriptors that a management program passed, and files named after them.

``/dev/fdset/N`` as a file name means: the descriptor of set N that was opened with the
wanted access. The sets belong to the process, whichever monitor they came through.

Reference: ``add-fd``, ``remove-fd``, ``query-fdsets`` and ``-add-fd``; texts as in QEMU 11.1.
"""

import fcntl
import os
import re
from dataclasses import dataclass

from migrationd.errors import ConnectFailed, QMPError

FILE_PREFIX = "/dev/fdset/"
FDSET_ID_LIMIT = 1 << 31

_NUMBER = re.compile(r"[0-9]{1,10}")
_KEPT_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_DIRECT
"""What the text of a refusal shows; the rest is our own business."""


@dataclass(frozen=True, slots=True)
class FdSetFd:
    """A descriptor of a set.

    Attributes:
        fd: Its number in this process; owned by the set.
        opaque: What the client called it, or None.
    """

    fd: int
    opaque: str | None = None


class FdSets:
    """All sets of a process; used on the event loop."""

    def __init__(self) -> None:
        self._sets: dict[int, list[FdSetFd]] = {}

    def add(self, fd: int, fdset_id: int | None = None, opaque: str | None = None) -> int:
        """Add a descriptor, which belongs to the set from then on.

        Args:
            fd: A descriptor; closed when it is refused.
            fdset_id: Which set; the lowest free number by default.
            opaque: Any text, given back by ``query-fdsets``.

        Returns:
            The set's number.

        Raises:
            QMPError: The number is no set's.
        """
        if fdset_id is None:
            fdset_id = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
        elif not 0 <= fdset_id < FDSET_ID_LIMIT:
            os.close(fd)
            raise QMPError("Parameter 'fdset-id' expects a non-negative value")
        self._sets.setdefault(fdset_id, []).append(FdSetFd(fd, opaque))
        return fdset_id

    def remove(self, fdset_id: int, fd: int | None = None) -> None:
        """Close a descriptor of a set, or all; what was opened by the set's name goes on.

        Raises:
            QMPError: There is no such set or no such descriptor in it.
        """
        members = self._sets.get(fdset_id, [])
        gone = [member for member in members if fd is None or member.fd == fd]
        if not gone:
            name = f"fdset-id:{fdset_id}" + ("" if fd is None or not members else f", fd:{fd}")
            raise QMPError(f"File descriptor named '{name}' not found")
        for member in gone:
            os.close(member.fd)
            members.remove(member)
        if not members:
            del self._sets[fdset_id]

    def items(self) -> list[tuple[int, list[FdSetFd]]]:
        """Sets, highest number first, each with its descriptors in the order they came."""
        return [(number, list(self._sets[number])) for number in sorted(self._sets, reverse=True)]

    def duplicate(self, fdset_id: int, flags: int) -> int:
        """A new descriptor of the first that fits; it shares its position in the file.

        Args:
            fdset_id: Which set.
            flags: As of ``open``; access mode and O_DIRECT have to agree.

        Raises:
            ConnectFailed: No such set, or none fits.
        """
        if fdset_id not in self._sets:
            raise ConnectFailed(f"Failed to find fdset {FILE_PREFIX}{fdset_id}")
        mask = os.O_ACCMODE | (flags & os.O_DIRECT)
        for member in self._sets[fdset_id]:
            if fcntl.fcntl(member.fd, fcntl.F_GETFL) & mask == flags & mask:
                return int(fcntl.fcntl(member.fd, fcntl.F_DUPFD_CLOEXEC, 0))
        raise ConnectFailed(
            f"Failed to find file descriptor with matching flags=0x{flags & _KEPT_FLAGS:x}"
        )

    def close(self) -> None:
        """Close everything."""
        for members in self._sets.values():
            for member in members:
                os.close(member.fd)
        self._sets = {}


FDSETS = FdSets()
"""The sets of this process."""


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a file by its name, or by the name of a set of descriptors.

    Args:
        path: A path, or ``/dev/fdset/N``.
        flags: As of ``os.open``; O_CLOEXEC is implied.
        mode: For a file that is created.

    Raises:
        ConnectFailed: The set's name is wrong, or nothing in it fits.
        OSError: The file cannot be opened.
    """
    if not path.startswith(FILE_PREFIX):
        return os.open(path, flags | os.O_CLOEXEC, mode)
    number = path.removeprefix(FILE_PREFIX)
    if not _NUMBER.fullmatch(number) or int(number) >= FDSET_ID_LIMIT:
        raise ConnectFailed(f"Could not parse fdset {path}")
    return FDSETS.duplicate(int(number), flags)

"""A clone of a template whose memory is still here: what a daemon that dies leaves on record.

    NAME.clone.N.json   as the sidecar of a guest that is being handed over
    NAME.clone.N.lock   held by the daemon that sends the clone

A template is read by several daemons at a time, and each sends its clones one after the other.
A record without a living holder is an orphan: the next daemon with ``-keep`` goes on with it.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self

from migrationd.errors import StoreError
from migrationd.store.sidecar import Sidecar, read_sidecar, sync_directory, write_sidecar

_RECORDS_MAX = 1000


class CloneRecord:
    """One record; holds its lock until :meth:`close`.

    Args:
        path: Of the record.
        name: Guest name.
        lock: Descriptor that holds the lock; closed with the record.

    Attributes:
        path: Of the record.
    """

    def __init__(self, path: Path, name: str, lock: int) -> None:
        self.path = path
        self._name = name
        self._lock = lock

    @classmethod
    def begin(cls, directory: Path, name: str) -> Self:
        """Make room for a new record; nothing is written yet.

        Raises:
            StoreError: The directory cannot be written, or there are too many records.
        """
        for number in range(_RECORDS_MAX):
            path = _record_path(directory, name, number)
            if path.exists():
                continue
            lock = _take(path)
            if lock is None:
                continue
            if not path.exists():
                return cls(path, name, lock)
            os.close(lock)
        raise StoreError(f"'{directory}' has {_RECORDS_MAX} clones of '{name}' under way")

    @classmethod
    def find_orphan(cls, directory: Path, name: str) -> tuple[Self, Sidecar] | None:
        """The record of a clone that no living daemon sends; None if there is none.

        Raises:
            StoreError: There is one, but it cannot be read.
        """
        for path in sorted(directory.glob(f"{_glob_escape(name)}.clone.*.json")):
            lock = _take(path)
            if lock is None:
                continue
            try:
                sidecar = read_sidecar(path)
            except StoreError:
                os.close(lock)
                raise
            if sidecar is not None and sidecar.lazy is not None:
                return cls(path, name, lock), sidecar
            os.close(lock)
        return None

    def write(self, destination: str | None, lazy: dict[str, bool]) -> None:
        """Put on record how far the clone is, durably.

        Raises:
            StoreError: The record cannot be written.
        """
        sidecar = Sidecar(self._name, "handing-over", destination=destination, lazy=lazy)
        try:
            write_sidecar(self.path, sidecar)
        except OSError as error:
            raise StoreError(f"'{self.path}': {error.strerror}") from error

    def remove(self) -> None:
        """The clone has all of its memory, or is given up.

        Raises:
            StoreError: The record cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
            sync_directory(self.path.parent)
            _lock_path(self.path).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"'{self.path}': {error.strerror}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Leave the record to whoever goes on with it; any number of times."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _record_path(directory: Path, name: str, number: int) -> Path:
    return directory / f"{name}.clone.{number}.json"


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _glob_escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _take(path: Path) -> int | None:
    """Lock a record; None if somebody holds it.

    Raises:
        StoreError: The lock cannot be made.
    """
    place = _lock_path(path)
    try:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"'{place}': {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock whose file was removed meanwhile is none.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(place)):
                return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None

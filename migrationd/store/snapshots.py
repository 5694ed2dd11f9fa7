"""Saved states of a guest at rest, under tags.

    NAME.snapshots/TAG.mapped-ram   the guest's file as it was
    NAME.snapshots/TAG.json         its sidecar

The file of a guest at rest is never written again, so that a saved state is one more name
of it: it takes no time and no room until the guest of that name is another one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from migrationd.errors import StoreError
from migrationd.store.mapped_ram_reader import read_contents
from migrationd.store.parked_directory import ParkedDirectory
from migrationd.store.sidecar import Sidecar, read_sidecar, sync_directory, write_sidecar

_SUFFIX = ".mapped-ram"
_NAME_LIMIT = 200


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A saved state.

    Attributes:
        tag: Its name.
        size_bytes: What it takes on the disk.
        saved_s: When it was saved, in seconds since the epoch.
    """

    tag: str
    size_bytes: int
    saved_s: float


class Snapshots:
    """The saved states of one guest name; used by one thread at a time.

    Args:
        directory: Where the guest rests, locked.
    """

    def __init__(self, directory: ParkedDirectory) -> None:
        self._directory = directory
        self._path = directory.ram_path.with_suffix(".snapshots")

    def save(self, tag: str) -> None:
        """Save the guest at rest.

        Raises:
            StoreError: There is none, the tag is taken or is no tag, or it cannot be saved.
        """
        file, sidecar = self._paths(tag)
        if file.exists():
            raise StoreError(f"Snapshot '{tag}' already exists in one or more devices")
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            write_sidecar(
                sidecar, replace(self._directory.recorded(), owner="held", destination=None)
            )
            os.link(self._directory.ram_path, file)
            # The name of the directory, and the names in it.
            sync_directory(self._path)
            sync_directory(self._path.parent)
        except FileNotFoundError:
            raise StoreError("there is no guest at rest to save") from None
        except OSError as error:
            raise StoreError(f"'{file}': {error.strerror}") from error

    def load(self, tag: str) -> None:
        """Make a saved state the guest at rest; the one that rests there is given up.

        Raises:
            StoreError: There is no such state, or it cannot be put in place.
        """
        file, sidecar = self._paths(tag)
        if not file.exists():
            raise StoreError(f"Snapshot '{tag}' does not exist in one or more devices")
        record = read_sidecar(sidecar) or Sidecar(self._directory.name)
        try:
            # What cannot be read must not take the place of what can.
            with open(file, "rb") as opened:
                read_contents(opened.fileno(), str(file))
            self._directory.replace_guest(file, record)
        except OSError as error:
            raise StoreError(f"'{file}': {error.strerror}") from error

    def delete(self, tag: str) -> None:
        """Remove a saved state; nothing if there is none.

        Raises:
            StoreError: It cannot be removed.
        """
        file, sidecar = self._paths(tag)
        try:
            for path in (file, sidecar):
                path.unlink(missing_ok=True)
            if self._path.exists():
                sync_directory(self._path)
        except OSError as error:
            raise StoreError(f"'{file}': {error.strerror}") from error

    def list(self) -> Iterator[Snapshot]:
        """All saved states, oldest first.

        Raises:
            StoreError: They cannot be listed.
        """
        try:
            found = [
                Snapshot(unquote(path.stem), path.stat().st_blocks * 512, sidecar.stat().st_mtime)
                for path in self._path.glob("*" + _SUFFIX)
                if (sidecar := path.with_suffix(".json")).exists()
            ]
        except OSError as error:
            raise StoreError(f"'{self._path}': {error.strerror}") from error
        yield from sorted(found, key=lambda snapshot: snapshot.saved_s)

    def _paths(self, tag: str) -> tuple[Path, Path]:
        name = quote(tag, safe=" ").replace(".", "%2E")
        if not name or len(name) > _NAME_LIMIT:
            raise StoreError(f"a snapshot's tag has 1 to {_NAME_LIMIT} characters, not '{tag}'")
        return self._path / (name + _SUFFIX), self._path / (name + ".json")

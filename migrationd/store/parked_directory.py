"""Guests at rest in a directory: one file each, a sidecar, and a lock.

    NAME.mapped-ram        the guest, a file that QEMU itself loads
    NAME.json              what the file cannot say: owner, name, form of the stream
    NAME.mapped-ram.part   a guest that is still arriving; never offered
    NAME.lock              held by the daemon that owns the name

Files are written aside, synced and renamed; the sidecar last. A guest exists when its
sidecar does.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.errors import StoreError
from migrationd.store.mapped_ram import (
    Contents,
    Layout,
    PlacedBlock,
    encode_tail,
    plan_layout,
    read_contents,
    write_at,
    write_bitmap,
)

SIDECAR_VERSION = 1
_SIDECAR_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What the sidecar says.

    Attributes:
        name: Guest name.
        owner: ``held``, ``handing-over`` or ``handed-over``.
        destination: Where it was handed over to.
        seen: Which optional parts the arriving stream had.
    """

    name: str
    owner: str = "held"
    destination: str | None = None
    seen: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """A guest found at rest; the descriptor belongs to the taker."""

    fd: int
    contents: Contents
    sidecar: Sidecar


class NewGuest:
    """A guest that is being written; made by :meth:`ParkedDirectory.begin`.

    Attributes:
        fd: File, open for reading and writing.
        layout: Where its parts go.
    """

    def __init__(self, directory: "ParkedDirectory", fd: int, layout: Layout) -> None:
        self._directory = directory
        self.fd = fd
        self.layout = layout

    def commit(
        self,
        present: "Sequence[object]",
        late: Sequence[OpaqueSection],
        vmdescription: bytes,
        *,
        switchover_start: bool,
        seen: dict[str, bool],
    ) -> None:
        """Write what is missing and make the guest durable; it exists afterwards.

        Args:
            present: For each block, one bool per page.
            late: Sections after RAM.
            vmdescription: JSON.
            switchover_start: Whether the stream contained SWITCHOVER_START.
            seen: For the sidecar.

        Raises:
            StoreError: The guest is not on stable storage.
        """
        try:
            for block, bools in zip(self.layout.blocks, present, strict=True):
                write_bitmap(self.fd, block, bools)  # type: ignore[arg-type]  # bool arrays
            tail = encode_tail(late, vmdescription, switchover_start=switchover_start)
            write_at(self.fd, tail, self.layout.tail_position)
            os.ftruncate(self.fd, self.layout.tail_position + len(tail))
            os.fsync(self.fd)
            self._directory.put_in_place(seen)
        except OSError as error:
            raise StoreError(f"the guest cannot be stored: {error.strerror}") from error

    def abandon(self) -> None:
        """Throw the unfinished guest away."""
        self._directory.remove_part()


class ParkedDirectory:
    """The place of one guest name in a directory; holds its lock.

    Args:
        path: Directory; made if it is missing.
        name: Guest name.

    Raises:
        StoreError: The directory cannot be used, or another daemon holds the name.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._ram = path / f"{name}.mapped-ram"
        self._part = path / f"{name}.mapped-ram.part"
        self._sidecar = path / f"{name}.json"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(
                path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StoreError(f"-ram-dir '{path}': {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreError(f"another daemon holds guest '{name}' in '{path}'") from None
        self.remove_part()

    def find(self) -> SavedGuest | None:
        """Open the guest of this name; its pages are mapped lazily by the taker.

        Raises:
            StoreError: There is one, but it cannot be read.
        """
        if not self._sidecar.exists():
            return None
        sidecar = self._read_sidecar()
        try:
            fd = os.open(self._ram, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"'{self._ram}': {error.strerror}") from error
        try:
            return SavedGuest(fd, read_contents(fd, str(self._ram)), sidecar)
        except BaseException:
            os.close(fd)
            raise

    def begin(
        self,
        configuration: Configuration,
        early: Sequence[OpaqueSection],
        blocks: Sequence[tuple[str, int]],
        page_size: int,
    ) -> NewGuest:
        """Make the file of an arriving guest, with places for its pages.

        Raises:
            StoreError: The file cannot be made.
        """
        layout = plan_layout(configuration, early, blocks, page_size)
        try:
            fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, layout.tail_position)
                for position, data in layout.pieces:
                    write_at(fd, data, position)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise StoreError(f"'{self._part}': {error.strerror}") from error
        return NewGuest(self, fd, layout)

    def put_in_place(self, seen: dict[str, bool]) -> None:
        """Rename the finished file and write its sidecar, durably.

        Raises:
            OSError: As the calls.
        """
        # The old sidecar describes the old file: it goes before the file is replaced.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._sidecar)
        os.rename(self._part, self._ram)
        self._write_sidecar(Sidecar(self._name, seen=seen))

    def record_owner(self, owner: str, destination: str | None) -> None:
        """Change the owner on record, durably.

        Raises:
            StoreError: The record cannot be written.
        """
        try:
            old = self._read_sidecar()
            self._write_sidecar(Sidecar(self._name, owner, destination, old.seen))
        except OSError as error:
            raise StoreError(f"'{self._sidecar}': {error.strerror}") from error

    def remove_part(self) -> None:
        """Remove an unfinished guest."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)

    def close(self) -> None:
        """Give the name up to other daemons."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read_sidecar(self) -> Sidecar:
        try:
            if self._sidecar.stat().st_size > _SIDECAR_LIMIT:
                raise ValueError("too large")
            tree = json.loads(self._sidecar.read_text("utf-8"))
            if tree["version"] != SIDECAR_VERSION:
                raise ValueError(f"version {tree['version']}, only {SIDECAR_VERSION} is known")
            if tree["owner"] not in ("held", "handing-over", "handed-over"):
                raise ValueError(f"owner '{tree['owner']}'")
            seen = {str(key): bool(value) for key, value in tree["seen"].items()}
            return Sidecar(str(tree["name"]), tree["owner"], tree["destination"], seen)
        except OSError as error:
            raise StoreError(f"'{self._sidecar}': {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"'{self._sidecar}' is not a guest's record: {error}") from None

    def _write_sidecar(self, sidecar: Sidecar) -> None:
        aside = self._sidecar.with_suffix(".json.part")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            text = json.dumps({"version": SIDECAR_VERSION, **asdict(sidecar)}, indent=2)
            write_at(fd, text.encode() + b"\n", 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, self._sidecar)
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


__all__ = ["NewGuest", "ParkedDirectory", "PlacedBlock", "SavedGuest", "Sidecar"]

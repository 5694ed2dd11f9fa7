"""Guests at rest in a directory: one file each, a sidecar, and a lock.

    NAME.mapped-ram        the guest, a file that QEMU itself loads
    NAME.json              what the file cannot say: owner, run state, form of the stream, sums
    NAME.mapped-ram.part   a guest that is still arriving; never offered
    NAME.order             in which order the guest asked for its pages; a hint
    NAME.lock              held by the daemon that owns the name

A guest arrives aside, is read back, synced, described by its sidecar, and only then renamed
into place: a file in place is whole, and its sidecar is the one that belongs to it. A file
that somebody put there without a sidecar is a guest too: QEMU may have written it.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.errors import StoreError
from migrationd.store.mapped_ram import Layout, plan_layout
from migrationd.store.mapped_ram_reader import Contents, read_contents
from migrationd.store.mapped_ram_writer import MappedRamWriter
from migrationd.store.sidecar import (
    Sidecar,
    read_sidecar,
    sync_directory,
    write_aside,
    write_sidecar,
)
from migrationd.store.write_behind import WriteBehind


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """A guest found at rest; the descriptor belongs to the taker."""

    fd: int
    contents: Contents
    sidecar: Sidecar


class NewGuest:
    """A guest that is being written; made by :meth:`ParkedDirectory.begin`.

    Attributes:
        fd: File, open for reading and writing; closed by its user after commit or abandon.
        layout: Where its parts go.
    """

    def __init__(
        self,
        directory: "ParkedDirectory",
        fd: int,
        layout: Layout,
        early: Sequence[OpaqueSection],
    ) -> None:
        self._directory = directory
        self.fd = fd
        self.layout = layout
        self._early = tuple(early)
        self._writer = MappedRamWriter(fd, layout)
        self._write_behind = WriteBehind(fd)

    def commit(
        self,
        present: Sequence[npt.NDArray[np.bool_]],
        late: Sequence[OpaqueSection],
        vmdescription: bytes,
        *,
        switchover_start: bool,
        seen: dict[str, bool],
        setup: Sequence[OpaqueSection] = (),
        page_sizes: dict[str, int] | None = None,
    ) -> None:
        """Write what is missing and make the guest durable; it exists afterwards.

        Args:
            present: For each block, one bool per page.
            late: Sections after the setup phase, in order.
            vmdescription: JSON.
            switchover_start: Whether the stream contained SWITCHOVER_START.
            seen: For the sidecar.
            setup: Sections of the setup phase that are not in the layout.
            page_sizes: For the sidecar.

        Raises:
            StoreError: The guest is not on stable storage, or does not read back.
        """
        self._write_behind.stop()
        try:
            self._writer.write_rest(
                present, setup, late, vmdescription, switchover_start=switchover_start
            )
            written = self._writer.read_back([*self._early, *setup], late, "the guest's file")
            os.fsync(self.fd)
            self._directory.put_in_place(
                seen,
                file_bytes=written.size,
                metadata_crc32=written.metadata_crc32,
                page_sizes=page_sizes or {},
            )
        except OSError as error:
            raise StoreError(f"the guest cannot be stored: {error.strerror}") from error

    def abandon(self) -> None:
        """Throw the unfinished guest away."""
        self._write_behind.stop()
        self._directory.remove_part()


class ParkedDirectory:
    """The place of one guest name in a directory; holds its lock.

    Used by one thread at a time.

    Args:
        path: Directory; made if it is missing.
        name: Guest name, without a slash.
        is_shared: The guest here is a template: once there is one it is only read, by any number
            of daemons at a time.

    Raises:
        StoreError: The directory cannot be used, or another daemon holds the name.
    """

    def __init__(self, path: Path, name: str, *, is_shared: bool = False) -> None:
        self._path = path
        self._name = name
        self._is_shared = is_shared
        self._ram = path / f"{name}.mapped-ram"
        self._part = path / f"{name}.mapped-ram.part"
        self._sidecar = path / f"{name}.json"
        try:
            _make_directory(path)
            self._lock = os.open(
                path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StoreError(f"-ram-dir '{path}': {error.strerror}") from error
        try:
            self._take_lock()
            if not self._is_template:
                self.remove_part()
        except OSError as error:
            self.close()
            raise StoreError(f"'{self._part}': {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Guest name."""
        return self._name

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @property
    def ram_path(self) -> Path:
        """File of the guest at rest, whether there is one or not."""
        return self._ram

    @property
    def order_path(self) -> Path:
        """File with the order in which the guest asked for its pages."""
        return self._path / f"{self._name}.order"

    def recorded(self) -> Sidecar:
        """What is on record of the guest at rest.

        Raises:
            StoreError: The record cannot be read.
        """
        return self._recorded()

    def replace_guest(self, file: Path, sidecar: Sidecar) -> None:
        """Let another whole file be the guest, whatever rests here; it keeps its own name too.

        Raises:
            OSError: As the calls; with a full disk the old guest is still there. A crash leaves
                the old guest, none, or the new one.
            StoreError: The guest here is a template.
        """
        if self._is_template:
            raise StoreError(f"'{self._ram}' is a template (-keep): it is only read")
        self.remove_part()
        record = write_aside(self._sidecar, sidecar)
        os.link(file, self._part)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._ram)
            sync_directory(self._path)
        os.rename(record, self._sidecar)
        sync_directory(self._path)
        os.rename(self._part, self._ram)
        sync_directory(self._path)

    def find(self, *, ram_limit_bytes: int | None = None) -> SavedGuest | None:
        """Open the guest of this name; its pages are mapped lazily by the taker.

        Args:
            ram_limit_bytes: Largest guest that is taken.

        Raises:
            StoreError: There is one, but it cannot be read, or it is not the file that its
                sidecar was written for.
        """
        try:
            # Not blocking: nobody waits for the other end of a FIFO.
            fd = os.open(self._ram, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"'{self._ram}': {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(f"'{self._ram}' is no regular file")
            sidecar = read_sidecar(self._sidecar) or Sidecar(self._name)
            contents = read_contents(fd, str(self._ram), ram_limit_bytes=ram_limit_bytes)
            self._compare(sidecar, os.fstat(fd).st_size, contents.metadata_crc32)
            return SavedGuest(fd, contents, sidecar)
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

        Args:
            configuration: Of the guest.
            early: Sections that precede RAM.
            blocks: idstr and used length in bytes of each block, in order.
            page_size: Target page size in bytes.

        Raises:
            StoreError: The file cannot be made, or a guest that was not handed over rests here.
        """
        self._refuse_to_replace()
        layout = plan_layout(configuration, early, blocks, page_size)
        try:
            fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                MappedRamWriter(fd, layout).write_head()
                return NewGuest(self, fd, layout, early)
            except BaseException:
                os.close(fd)
                self.remove_part()
                raise
        except OSError as error:
            raise StoreError(f"'{self._part}': {error.strerror}") from error

    def put_in_place(
        self,
        seen: dict[str, bool],
        *,
        file_bytes: int,
        metadata_crc32: int,
        page_sizes: dict[str, int],
    ) -> None:
        """Make the finished, synced file the guest of this name, durably.

        Each step is on disk before the next one. A crash leaves the guest that was handed over,
        or nothing, or a sidecar without a file, which is nothing, or the new guest.

        Raises:
            OSError: As the calls.
            StoreError: A guest that was not handed over rests here.
        """
        self._refuse_to_replace()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._ram)
            sync_directory(self._path)
        sidecar = Sidecar(
            self._name,
            seen=seen,
            file_bytes=file_bytes,
            metadata_crc32=metadata_crc32,
            page_sizes=page_sizes,
        )
        write_sidecar(self._sidecar, sidecar)
        os.rename(self._part, self._ram)
        sync_directory(self._path)
        if self._is_shared:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def record_owner(
        self, owner: str, destination: str | None, lazy: dict[str, bool] | None = None
    ) -> None:
        """Change the owner on record, durably.

        Args:
            owner: ``held``, ``handing-over`` or ``handed-over``.
            destination: Where to, in the last two.
            lazy: In the second, if it goes by postcopy: how.

        Raises:
            StoreError: The record cannot be written.
        """
        self._write(replace(self._recorded(), owner=owner, destination=destination, lazy=lazy))

    def record_run_state(self, run_state: str) -> None:
        """Change the run state for the next host on record, durably; not that of a template.

        Raises:
            StoreError: The record cannot be written.
        """
        if self._is_shared:
            return
        self._write(replace(self._recorded(), run_state=run_state))

    def remove_part(self) -> None:
        """Remove an unfinished guest."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)

    def close(self) -> None:
        """Give the name up to other daemons."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def _is_template(self) -> bool:
        """Whether the guest here is one that others may read as well."""
        return self._is_shared and self._ram.exists()

    def _take_lock(self) -> None:
        kind = fcntl.LOCK_SH if self._is_template else fcntl.LOCK_EX
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another daemon"
            raise StoreError(f"{who} holds guest '{self._name}' in '{self._path}'") from None
        except OSError as error:
            raise StoreError(f"-ram-dir '{self._path}': {error.strerror}") from error
        if kind == fcntl.LOCK_SH:
            return
        # Who holds it is a word for people: a full disk must not keep a guest from being found.
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _compare(self, sidecar: Sidecar, file_bytes: int, metadata_crc32: int) -> None:
        if sidecar.name != self._name:
            raise StoreError(f"'{self._sidecar}' is the record of guest '{sidecar.name}'")
        if sidecar.file_bytes is None:
            return
        if (file_bytes, metadata_crc32) != (sidecar.file_bytes, sidecar.metadata_crc32):
            raise StoreError(
                f"'{self._ram}' was changed, or is not the file that '{self._sidecar}' describes: "
                f"{file_bytes} bytes with sum {metadata_crc32:#010x}, expected "
                f"{sidecar.file_bytes} with {sidecar.metadata_crc32 or 0:#010x}; to take the file "
                "as a new guest, remove the record"
            )

    def _refuse_to_replace(self) -> None:
        if self._ram.exists() and self._recorded().owner != "handed-over":
            raise StoreError(f"guest '{self._name}' rests in '{self._path}' already")

    def _recorded(self) -> Sidecar:
        return read_sidecar(self._sidecar) or Sidecar(self._name)

    def _write(self, sidecar: Sidecar) -> None:
        try:
            write_sidecar(self._sidecar, sidecar)
        except OSError as error:
            raise StoreError(f"'{self._sidecar}': {error.strerror}") from error


def _make_directory(path: Path) -> None:
    """Make what is missing of a path, durably: a guest is not kept in what nobody finds again."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)

"""Where guests rest: in memory, or durably in a directory."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

from migrationd.codec.records import Configuration
from migrationd.config import DaemonConfig
from migrationd.daemon.attached_berth import AttachedBerth, WorkloadSlot
from migrationd.daemon.cpr_berth import AttachedCprBerth, ParkedCprBerth
from migrationd.daemon.replica_berth import ReplicaBerth
from migrationd.errors import GuestError, QMPError, StoreError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.held import HeldGuest
from migrationd.guest.memory import AnonymousMemory, FileMemory
from migrationd.guest.owner_note import OwnerNote
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import IGNORE_SHARED, RamBlockSpec
from migrationd.guest.ready_memory import ReadyMemory
from migrationd.guest.run_state import LazyHandOver, Owner
from migrationd.incoming.berth import Berth
from migrationd.incoming.cpr import CprBerth
from migrationd.incoming.mapped_ram import complete_guest, copy_pages, map_guest, specs_of
from migrationd.store.clone_record import CloneRecord
from migrationd.store.mapped_ram_reader import Contents
from migrationd.store.page_order import Order, read_order, write_order
from migrationd.store.parked_directory import NewGuest, ParkedDirectory, SavedGuest
from migrationd.store.sidecar import Sidecar
from migrationd.store.snapshots import Snapshots

T = TypeVar("T")

log = logging.getLogger(__name__)

EMPTY_DESCRIPTION = b"{}"


class MemoryBerth:
    """Room for a guest in anonymous memory.

    Args:
        ready: Memory that was made ready for it, if some was.
    """

    def __init__(self, ready: ReadyMemory | None = None) -> None:
        self._ready = ready

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """Map memory for each block."""
        make = self._ready.take if self._ready is not None else AnonymousMemory
        return ParkedGuest.create(
            identity, blocks, lambda _, spec: make(spec.used_length, spec.page_size)
        )

    def adopt(self, fd: int, contents: Contents) -> ParkedGuest:
        """Map the guest where it is: the file must stay as it is while the guest is held."""
        return map_guest(fd, contents)

    def settle(self, guest: HeldGuest) -> None:
        """Give back what was ready and is not needed; no durability was asked for."""
        if self._ready is not None:
            self._ready.give_back_rest()

    def abandon(self) -> None:
        """Nothing: the guest releases its memory itself."""


class FileBerth:
    """Room for a guest in a file of a directory."""

    def __init__(self, directory: ParkedDirectory) -> None:
        self._directory = directory
        self._new: NewGuest | None = None
        self._early_count = 0

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """Lay the file out and map its pages areas."""
        if identity.machine is None:
            raise StoreError(
                "a stream without a machine type cannot rest in a file; start without -ram-dir"
            )
        if IGNORE_SHARED in (identity.capabilities or ()):
            raise StoreError("memory that stays in a shared file cannot rest in -ram-dir")
        page_size = blocks[0].page_size if blocks else 4096
        new = self._directory.begin(
            Configuration(identity.machine, identity.target_page_bits, None, identity.uuid),
            [device.to_section() for device in early],
            [(spec.idstr, spec.used_length) for spec in blocks],
            page_size,
        )
        self._new = new
        self._early_count = len(early)
        return ParkedGuest.create(
            identity,
            blocks,
            lambda index, spec: FileMemory(
                new.fd,
                new.layout.blocks[index].pages_position,
                spec.used_length,
                spec.page_size,
            ),
        )

    def adopt(self, fd: int, contents: Contents) -> ParkedGuest:
        """Give the guest a file of its own, which shares its pages where that is possible."""
        source = map_guest(fd, contents)
        try:
            early = [device for device in source.devices if device.is_early]
            guest = self.allocate(source.identity, early, specs_of(contents))
            assert self._new is not None
            try:
                copy_pages(source, self._new.fd, self._new.layout.blocks)
                source.check_unchanged()
                for block, origin in zip(guest.ram, source.ram, strict=True):
                    block.present = origin.present
                complete_guest(guest, contents)
            except BaseException:
                guest.close()
                raise
        finally:
            source.close()
        return guest

    def settle(self, guest: HeldGuest) -> None:
        """Write bitmaps and devices, sync, rename; the file is closed for writing then."""
        assert self._new is not None
        assert isinstance(guest, ParkedGuest)
        rest = guest.devices[self._early_count :]
        self._new.commit(
            [block.present for block in guest.ram],
            [device.to_section() for device in rest if not device.is_of_setup],
            guest.vmdescription or EMPTY_DESCRIPTION,
            switchover_start=guest.seen.switchover_start,
            seen=asdict(guest.seen),
            setup=[device.to_section() for device in rest if device.is_of_setup],
            page_sizes={b.idstr: b.backing_page_size for b in guest.ram if b.backing_page_size},
        )
        guest.rest_in(GuestFile(self._new.fd))
        os.close(self._new.fd)
        self._new = None

    def abandon(self) -> None:
        """Remove the unfinished file."""
        if self._new is not None:
            self._new.abandon()
            os.close(self._new.fd)
            self._new = None


class Shelter:
    """Makes room for arriving guests and keeps the record of who owns the held one.

    Args:
        config: Start-up configuration.

    Raises:
        StoreError: The directory cannot be used.

    Attributes:
        slot: The workload that is attached.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self.slot = WorkloadSlot()
        self._occupation: str | None = None
        self._is_attached = config.attach_path is not None
        self._is_template = config.keep
        self._clone: CloneRecord | None = None
        self._directory: ParkedDirectory | None = None
        self._ready: ReadyMemory | None = None
        if config.ram_prealloc_bytes:
            self._ready = ReadyMemory(config.ram_prealloc_bytes)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._ram_limit_bytes = config.ram_limit_bytes
        if config.ram_dir is not None and config.name is not None:
            self._directory = ParkedDirectory(config.ram_dir, config.name, is_shared=config.keep)

    @contextlib.contextmanager
    def occupied(self, why: str) -> Iterator[None]:
        """Let the guest not leave, and no other one come, inside the block.

        Args:
            why: Told who wants that.

        Raises:
            QMPError: It is occupied already.
        """
        self.check_free()
        self._occupation = why
        try:
            yield
        finally:
            self._occupation = None

    def check_free(self) -> None:
        """Make sure that the guest may leave or be replaced now.

        Raises:
            QMPError: It may not.
        """
        if self._occupation is not None:
            raise QMPError(self._occupation)

    def make_ready(self) -> None:
        """Touch the memory of ``-ram-prealloc``; on a thread of its own, for it takes a while."""
        if self._ready is not None:
            self._ready.make_ready()

    def berth(self) -> Berth:
        """Room for one arriving guest."""
        if self._is_attached:
            return AttachedBerth(self.slot)
        return (
            FileBerth(self._directory) if self._directory is not None else MemoryBerth(self._ready)
        )

    def replica_berth(self) -> ReplicaBerth | None:
        """Room for a COLO replica that rests in the directory once it has taken over.

        None where there is no directory: :meth:`berth` is good for it then.
        """
        if self._directory is None:
            return None
        return ReplicaBerth(MemoryBerth(self._ready), FileBerth(self._directory))

    def cpr_berth(self) -> CprBerth:
        """Room for one guest whose memory comes over a cpr channel."""
        if self._is_attached:
            return AttachedCprBerth(self.slot)
        return ParkedCprBerth(self._ram_limit_bytes)

    def find(self) -> ParkedGuest | None:
        """The guest that rests in the directory, with its memory mapped lazily.

        Raises:
            StoreError: There is one, but it cannot be read.
        """
        if self._directory is None:
            return None
        saved = self._directory.find(ram_limit_bytes=self._ram_limit_bytes)
        if saved is None:
            return None
        guest = open_saved(saved)
        if self._is_template:
            orphan = CloneRecord.find_orphan(self._directory.path, self._directory.name)
            if orphan is not None:
                self._clone, sidecar = orphan
                guest.lazy = _lazy(sidecar)
        return guest

    def record_owner(
        self,
        guest: HeldGuest,
        owner: Owner,
        destination: str | None,
        lazy: LazyHandOver | None = None,
    ) -> "asyncio.Future[None]":
        """Put on record who owns the guest, durably where it rests in a file.

        Records are written in the order of the calls, awaited or not.

        Args:
            guest: The held guest.
            owner: What is to be on record; the guest itself is not changed.
            destination: Where it goes or went.
            lazy: How, if it goes by postcopy.

        Returns:
            Done when the record is on stable storage; raises StoreError if it cannot be.
        """
        if isinstance(guest, AttachedGuest):
            return self._tell_workload(guest, OwnerNote(owner, destination, lazy))
        flags = asdict(lazy) if lazy is not None else None
        return self._record(
            lambda directory: directory.record_owner(owner.value, destination, flags)
        )

    def record_clone(self, destination: str, lazy: LazyHandOver) -> "asyncio.Future[None]":
        """Put on record that a clone of the template runs, or may run, without its memory."""

        def record(directory: ParkedDirectory) -> None:
            if self._clone is None:
                self._clone = CloneRecord.begin(directory.path, directory.name)
            self._clone.write(destination, asdict(lazy))

        return self._record(record)

    def forget_clone(self) -> "asyncio.Future[None]":
        """Take the record away: the clone is whole, or there is none."""

        def forget(_: ParkedDirectory) -> None:
            clone, self._clone = self._clone, None
            if clone is not None:
                clone.remove()

        return self._record(forget)

    def read_order(self, guest: ParkedGuest) -> Order | None:
        """The order in which a guest at rest asked for its pages, if that is known."""
        if self._directory is None:
            return None
        return read_order(self._directory.order_path, _page_counts(guest))

    def record_order(self, guest: ParkedGuest, order: Order) -> "asyncio.Future[None]":
        """Keep the order beside the guest, where it rests in a file; a failure is logged."""
        blocks = _page_counts(guest)

        def write(directory: ParkedDirectory) -> None:
            try:
                write_order(directory.order_path, blocks, order)
            except OSError as error:
                log.warning("'%s': %s", directory.order_path, error.strerror)

        return self._record(write)

    def record_run_state(self, run_state: str) -> "asyncio.Future[None]":
        """Put the run state for the next host on record; as :meth:`record_owner`."""
        return self._record(lambda directory: directory.record_run_state(run_state))

    @property
    def has_snapshots(self) -> bool:
        """Whether states of the guest can be saved: it rests in a directory."""
        return self._directory is not None

    async def with_snapshots(self, call: Callable[[Snapshots], T]) -> T:
        """Do something with the saved states, in order with the records.

        Raises:
            StoreError: There is no directory, or what the call raises.
        """
        directory = self._directory
        if directory is None:
            raise StoreError("No block device can accept snapshots")
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._writer, lambda: call(Snapshots(directory)))
        return await asyncio.shield(work)

    def close(self) -> None:
        """Finish the records and give the directory up."""
        if self._ready is not None:
            self._ready.close()
        self._writer.shutdown(wait=True)
        if self._clone is not None:
            self._clone.close()
        if self._directory is not None:
            self._directory.close()

    def _tell_workload(self, guest: AttachedGuest, note: OwnerNote) -> "asyncio.Future[None]":
        """Let a workload keep its record; it may be gone, and its memory elsewhere all the same."""

        def tell() -> None:
            try:
                guest.record_owner(note)
            except GuestError as error:
                log.warning("the workload keeps no record of its owner: %s", error)

        return asyncio.shield(asyncio.get_running_loop().run_in_executor(self._writer, tell))

    def _record(self, change: Callable[[ParkedDirectory], None]) -> "asyncio.Future[None]":
        loop = asyncio.get_running_loop()
        directory = self._directory
        if directory is None:
            nothing: asyncio.Future[None] = loop.create_future()
            nothing.set_result(None)
            return nothing
        return asyncio.shield(loop.run_in_executor(self._writer, change, directory))


def _page_counts(guest: ParkedGuest) -> list[tuple[str, int]]:
    return [(block.idstr, block.page_count) for block in guest.ram]


def open_saved(saved: SavedGuest) -> ParkedGuest:
    """Map a guest at rest; closes the descriptor.

    Raises:
        StoreError: Its file does not hold what it says.
        GuestError: It cannot be mapped.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, saved.fd)
        guest = map_guest(saved.fd, saved.contents, saved.sidecar.seen)
        if saved.sidecar.run_state is not None:
            guest.choose_run_state(saved.sidecar.run_state)
        guest.restore_owner(Owner(saved.sidecar.owner))
        for block in guest.ram:
            size = saved.sidecar.page_sizes.get(block.idstr, 0)
            if size > block.page_size and not block.used_length % size:
                block.backing_page_size = size
        if guest.owner is Owner.HANDING_OVER:
            guest.lazy = _lazy(saved.sidecar)
    return guest


def _lazy(sidecar: Sidecar) -> LazyHandOver | None:
    if sidecar.lazy is None:
        return None
    return LazyHandOver(
        preempt=sidecar.lazy.get("preempt", False), is_loaded=sidecar.lazy.get("is_loaded", False)
    )

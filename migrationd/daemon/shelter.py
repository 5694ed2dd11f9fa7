"""Where guests rest: in memory, or durably in a directory."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict

from migrationd.codec.constants import QEMU_VM_SECTION_START
from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.config import DaemonConfig
from migrationd.errors import StoreError
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import AnonymousMemory, FileMemory
from migrationd.guest.parked import GuestIdentity, ParkedGuest, SeenOnArrival
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.run_state import Owner
from migrationd.incoming.driver import Berth
from migrationd.store.mapped_ram import read_bitmap
from migrationd.store.parked_directory import NewGuest, ParkedDirectory, SavedGuest

EMPTY_DESCRIPTION = b"{}"


class MemoryBerth:
    """Room for a guest in anonymous memory."""

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """Map memory for each block."""
        return ParkedGuest.create(
            identity, blocks, lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size)
        )

    def settle(self, guest: ParkedGuest) -> None:
        """Nothing: no durability was asked for."""

    def abandon(self) -> None:
        """Nothing: the guest releases its memory itself."""


class FileBerth:
    """Room for a guest in a file of a directory."""

    def __init__(self, directory: ParkedDirectory) -> None:
        self._directory = directory
        self._new: NewGuest | None = None

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
        page_size = blocks[0].page_size if blocks else 4096
        new = self._directory.begin(
            Configuration(identity.machine, identity.target_page_bits, None, identity.uuid),
            [_opaque(device) for device in early],
            [(spec.idstr, spec.used_length) for spec in blocks],
            page_size,
        )
        self._new = new
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

    def settle(self, guest: ParkedGuest) -> None:
        """Write bitmaps and devices, sync, rename; the file is closed for writing then."""
        assert self._new is not None
        self._new.commit(
            [block.present for block in guest.ram],
            [_opaque(device) for device in guest.devices if not device.is_early],
            guest.vmdescription or EMPTY_DESCRIPTION,
            switchover_start=guest.seen.switchover_start,
            seen=asdict(guest.seen),
        )
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
    """

    def __init__(self, config: DaemonConfig) -> None:
        self._directory: ParkedDirectory | None = None
        self._writes = asyncio.Lock()
        if config.ram_dir is not None and config.name is not None:
            self._directory = ParkedDirectory(config.ram_dir, config.name)

    def berth(self) -> Berth:
        """Room for one arriving guest."""
        return FileBerth(self._directory) if self._directory is not None else MemoryBerth()

    def find(self) -> ParkedGuest | None:
        """The guest that rests in the directory, with its memory mapped lazily.

        Raises:
            StoreError: There is one, but it cannot be read.
        """
        saved = self._directory.find() if self._directory is not None else None
        return open_saved(saved) if saved is not None else None

    async def record_owner(self, guest: ParkedGuest, destination: str | None) -> None:
        """Put on record who owns the guest, durably where it rests in a file.

        Raises:
            StoreError: The record cannot be written.
        """
        if self._directory is not None:
            async with self._writes:
                await asyncio.to_thread(
                    self._directory.record_owner, guest.owner.value, destination
                )

    def close(self) -> None:
        """Give the directory up."""
        if self._directory is not None:
            self._directory.close()


def open_saved(saved: SavedGuest) -> ParkedGuest:
    """Map a guest at rest; closes the descriptor.

    Raises:
        StoreError: Its file does not hold what it says.
        GuestError: It cannot be mapped.
    """
    contents = saved.contents
    configuration = contents.configuration
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, saved.fd)
        guest = ParkedGuest.create(
            GuestIdentity(
                configuration.machine,
                configuration.target_page_bits,
                None,
                configuration.uuid,
            ),
            [
                RamBlockSpec(block.idstr, block.used_length, block.page_size)
                for block in contents.blocks
            ],
            lambda index, spec: FileMemory(
                saved.fd, contents.blocks[index].pages_position, spec.used_length, spec.page_size
            ),
        )
        for block, place in zip(guest.ram, contents.blocks, strict=True):
            block.present[:] = read_bitmap(saved.fd, place)
        seen = SeenOnArrival(
            **{"switchover_start": contents.has_switchover_start, **saved.sidecar.seen}
        )
        guest.complete(
            [_device(section, is_early=True) for section in contents.early]
            + [_device(section, is_early=False) for section in contents.late],
            contents.vmdescription,
            seen,
        )
        guest.restore_owner(Owner(saved.sidecar.owner))
    return guest


def _opaque(device: DeviceState) -> OpaqueSection:
    return OpaqueSection(
        device.kind,
        device.section_id,
        device.idstr,
        device.instance_id,
        device.version_id,
        device.body,
        has_footer=True,
    )


def _device(section: OpaqueSection, *, is_early: bool) -> DeviceState:
    return DeviceState(
        section.idstr,
        section.instance_id,
        section.version_id,
        section.body,
        section.kind,
        section.section_id,
        is_early=is_early and section.kind != QEMU_VM_SECTION_START,
    )

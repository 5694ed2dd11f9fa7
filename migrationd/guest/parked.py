"""A guest that arrived over a migration and is held: it never executes.

It takes its shape from the stream; device sections are the bytes that came.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from migrationd.errors import GuestError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.handed import CopiedMemory, HandedMemory, copied_memory
from migrationd.guest.memory import AnonymousMemory, Memory, Pages, SharedMemory
from migrationd.guest.ram_block import IGNORE_SHARED, RamBlock, RamBlockSpec
from migrationd.guest.run_state import (
    GLOBAL_STATE,
    RUNNING,
    LazyHandOver,
    Owned,
    Owner,
    decode_run_state,
    encode_run_state,
)


class ParkedGuest(Owned):
    """RAM blocks, device sections and run state of a held guest.

    Filled by one loading thread, then completed, then only read; run state and owner
    change on the event loop.

    Args:
        identity: From the configuration.
        ram: Blocks in the order of the block list.

    Attributes:
        file: The file that all pages are in, or None.
        lazy: Of a guest found at rest: its hand-over by postcopy that an earlier daemon began.
        page_order: Pages in the order in which the guest asked for them, shape ``(n, 2)``:
            block index, page; None until it was resumed by postcopy.
    """

    def __init__(self, identity: GuestIdentity, ram: Sequence[RamBlock]) -> None:
        self.identity = identity
        self.ram: tuple[RamBlock, ...] = tuple(ram)
        self.devices: tuple[DeviceState, ...] = ()
        self.vmdescription: bytes | None = None
        self.file: GuestFile | None = None
        self._handed: HandedMemory | None = None
        self.seen = SeenOnArrival()
        self.lazy: LazyHandOver | None = None
        self.page_order: Pages | None = None

    @classmethod
    def create(
        cls,
        identity: GuestIdentity,
        specs: Sequence[RamBlockSpec],
        allocate: Callable[[int, RamBlockSpec], Memory],
    ) -> "ParkedGuest":
        """Make a guest of empty blocks.

        Args:
            identity: From the configuration.
            specs: Blocks in order.
            allocate: Gives memory to the block with this index.

        Raises:
            GuestError: There is no memory; what was allocated is released.
        """
        blocks: list[RamBlock] = []
        try:
            for index, spec in enumerate(specs):
                blocks.append(RamBlock(spec, allocate(index, spec)))
        except (GuestError, MemoryError) as error:
            for block in blocks:
                block.memory.close()
            raise GuestError(f"cannot allocate the guest's memory: {error}") from error
        return cls(identity, blocks)

    def complete(
        self,
        devices: Sequence[DeviceState],
        vmdescription: bytes | None,
        seen: SeenOnArrival,
    ) -> None:
        """Add what comes after RAM; the guest is whole then."""
        self.devices = tuple(devices)
        self.vmdescription = vmdescription
        self.seen = seen
        if IGNORE_SHARED in (self.identity.capabilities or ()):
            for block in self.ram:
                # Of any other block every page comes, zero pages too.
                block.is_elsewhere = block.received is not None and not block.received.any()
                block.received = None

    def rest_in(self, file: GuestFile) -> None:
        """Take over the file that all pages are in; it is closed with the guest."""
        self.file = file

    def keep_handed(self, handed: HandedMemory) -> None:
        """Take over the descriptors of memory that another process had.

        Raises:
            GuestError: It took some of it away; they are closed with the guest.
        """
        self._handed = handed
        for block in self.ram:
            memory = block.memory
            assert isinstance(memory, SharedMemory | CopiedMemory)
            if isinstance(memory, CopiedMemory):
                memory.take()
            present = np.zeros(block.page_count, np.bool_)
            for first, count in memory.data_runs().tolist():
                present[first : first + count] = True
            block.present = present

    @property
    def shares_memory(self) -> bool:
        """Whether what :meth:`offer_memory` gives is the memory that it has here."""
        return self._handed is not None

    def offer_memory(self) -> HandedMemory:
        """Its memory for another process: a copy, unless it came by descriptors itself.

        Raises:
            GuestError: There is no memory for a copy, or it cannot be read.
        """
        return self._handed.copy() if self._handed is not None else copied_memory(self.ram)

    def give_up_memory(self) -> None:
        """Let go of its memory, which another process has."""
        self.has_memory = False
        for block in self.ram:
            old, block.memory = block.memory, AnonymousMemory(block.used_length, block.page_size)
            # At once, whoever still has a look at it.
            old.give_back(np.array([[0, block.page_count]], np.int64))
            old.close()
            block.present = np.zeros(block.page_count, np.bool_)
        if self._handed is not None:
            self._handed.close()

    def restore_owner(self, owner: Owner) -> None:
        """Take over what is on record of a guest that was found at rest."""
        self._owner = owner

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return self.ram[0].page_size if self.ram else 4096

    @property
    def live(self) -> None:
        """Nothing: it never executes."""

    @property
    def ram_bytes(self) -> int:
        """RAM of all blocks."""
        return sum(block.used_length for block in self.ram)

    @property
    def present_bytes(self) -> int:
        """RAM that is not zero pages."""
        return sum(block.present_count * block.page_size for block in self.ram)

    @property
    def next_run_state(self) -> str:
        """The run state that the guest will have where it goes; running if none travels."""
        for device in self.devices:
            if device.idstr == GLOBAL_STATE:
                return decode_run_state(device.body) or RUNNING
        return RUNNING

    def choose_run_state(self, name: str) -> bool:
        """Choose the run state of the destination.

        Returns:
            False if the stream carries no run state (machine types up to 2.3): the
            destination then decides by its own ``-S``.
        """
        for index, device in enumerate(self.devices):
            if device.idstr == GLOBAL_STATE and decode_run_state(device.body) is not None:
                changed = replace(device, body=encode_run_state(device.body, name))
                self.devices = (*self.devices[:index], changed, *self.devices[index + 1 :])
                return True
        return False

    def give_back_zeros(self) -> None:
        """Release memory of zero pages; may take a while, call it on a thread."""
        if self.file is None:
            for block in self.ram:
                block.give_back_zeros()

    def check_unchanged(self) -> None:
        """Make sure that nobody has written to the file that its pages are in.

        Memory that another process handed over, and that could not be sealed, must not have
        shrunk: it goes on by its descriptor.

        Raises:
            GuestError: Somebody has.
        """
        if self._handed is not None and self.has_memory:
            for block in self.ram:
                self._handed.fd_of_block(block.idstr, block.used_length)
        if self.file is not None:
            self.file.check_unchanged()

    def close(self) -> None:
        """Release the memory."""
        blocks, self.ram = self.ram, ()
        for block in blocks:
            block.memory.close()
        if self.file is not None:
            self.file.close()
        if self._handed is not None:
            self._handed.close()

"""Room for an arriving guest in the memory of an attached workload."""

import threading
from collections.abc import Sequence

from migrationd.errors import GuestError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.held import HeldGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.workload_devices import DECLARATIONS
from migrationd.incoming.mapped_ram import complete_guest, load_pages, map_guest, specs_of
from migrationd.store.mapped_ram_reader import Contents

ATTACH_WAIT_S = 10.0
"""A stream waits this long for the workload that is to take it."""


class WorkloadSlot:
    """The workload that is attached, if any; the loading thread may wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guest: AttachedGuest | None = None

    def put(self, guest: AttachedGuest | None) -> None:
        """A workload came, or the one that was there is gone."""
        with self._changed:
            self._guest = guest
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> AttachedGuest:
        """The workload; waits for one.

        Raises:
            GuestError: None came in time.
        """
        with self._changed:
            if not self._changed.wait_for(self._is_there, timeout_s):
                raise GuestError("no workload is attached that could take the guest")
            assert self._guest is not None
            return self._guest

    def _is_there(self) -> bool:
        # One that was let go after a failure stays until its socket is noticed.
        return self._guest is not None and not self._guest.is_closed


class AttachedBerth:
    """Lets an arriving guest in where the workload has the same blocks and fitting devices.

    Args:
        slot: Where the workload is.
    """

    def __init__(self, slot: WorkloadSlot) -> None:
        self._slot = slot

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> AttachedGuest:
        """Check that the guest fits the workload, before its source stops.

        Raises:
            GuestError: It does not, naming machine, block, or device and field.
        """
        guest = self._slot.wait(ATTACH_WAIT_S)
        if identity.machine != guest.identity.machine:
            raise GuestError(
                f"the source is '{identity.machine}', the workload here is "
                f"'{guest.identity.machine}'"
            )
        here = [(block.idstr, block.used_length) for block in guest.ram]
        there = [(spec.idstr, spec.used_length) for spec in blocks]
        if here != there:
            raise GuestError(f"the source has RAM blocks {_text(there)}, here are {_text(here)}")
        if blocks and blocks[0].page_size != guest.page_size:
            raise GuestError(
                f"the source has pages of {blocks[0].page_size} bytes, here are {guest.page_size}"
            )
        declarations = next((item for item in early if item.idstr == DECLARATIONS), None)
        if declarations is None:
            raise GuestError("the source does not declare its devices: it is no workload")
        guest.check_declarations(declarations.body)
        guest.begin(is_destination=True)
        return guest

    def adopt(self, fd: int, contents: Contents) -> AttachedGuest:
        """Load the guest of a mapped-ram file into the workload.

        Raises:
            GuestError: As :meth:`allocate`, or the workload cannot load its devices.
            StoreError: The file does not hold what it says.
        """
        source = map_guest(fd, contents)
        try:
            early = [device for device in source.devices if device.is_early]
            guest = self.allocate(source.identity, early, specs_of(contents))
            load_pages(source, guest.ram)
            complete_guest(guest, contents)
        finally:
            source.close()
        return guest

    def settle(self, guest: HeldGuest) -> None:
        """Nothing: the workload keeps what it has."""

    def abandon(self) -> None:
        """Nothing: the workload is let go with the guest."""


def _text(blocks: list[tuple[str, int]]) -> str:
    return ", ".join(f"'{name}' of {size >> 20} MiB" for name, size in blocks[:8]) or "none"

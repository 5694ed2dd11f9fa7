"""Room for guests that bring their memory by cpr-transfer: parked, or in a workload."""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from migrationd.codec.cpr import decode_workload_tail
from migrationd.daemon.attached_berth import AttachedBerth, WorkloadSlot
from migrationd.errors import GuestError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.handed import HandedMemory, map_handed
from migrationd.guest.held import HeldGuest
from migrationd.guest.memory import Memory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.workload_devices import DECLARATIONS, declarations_section
from migrationd.store.mapped_ram_reader import Contents

log = logging.getLogger(__name__)


class ParkedCprBerth:
    """A guest is held in the memory that it had, with all descriptors that came along.

    Args:
        ram_limit_bytes: Largest guest.
    """

    def __init__(self, ram_limit_bytes: int | None) -> None:
        self._ram_limit_bytes = ram_limit_bytes
        self._handed: HandedMemory | None = None

    def take(self, handed: HandedMemory) -> None:
        """Keep the descriptors until the stream says what they are of.

        Raises:
            GuestError: The memory is more than is taken.
        """
        total = sum(os.fstat(fd).st_size for fd in handed.fds)
        if self._ram_limit_bytes is not None and total > self._ram_limit_bytes:
            handed.close()
            raise GuestError(f"memory of {total} bytes is more than -ram-limit")
        self._handed = handed

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """Map the memory of each block, or make room for a copy of what could shrink.

        Raises:
            GuestError: A block came without its memory.
        """
        handed = self._handed
        if handed is None:
            raise GuestError("a stream came without its memory: its cpr channel is missing")

        def memory_of(_: int, spec: RamBlockSpec) -> Memory:
            fd = handed.fd_of_block(spec.idstr, spec.used_length)
            return map_handed(fd, spec.used_length, spec.page_size)

        return ParkedGuest.create(identity, blocks, memory_of)

    def adopt(self, fd: int, contents: Contents) -> ParkedGuest:
        """Nothing comes out of a file so.

        Raises:
            GuestError: Always.
        """
        raise GuestError("cpr-transfer is no migration through a file")

    def settle(self, guest: HeldGuest) -> None:
        """Let the guest have the descriptors.

        Raises:
            GuestError: The source took memory away that it had handed over.
        """
        assert isinstance(guest, ParkedGuest)
        handed, self._handed = self._handed, None
        assert handed is not None
        guest.keep_handed(handed)

    def abandon(self) -> None:
        """Close the descriptors."""
        handed, self._handed = self._handed, None
        if handed is not None:
            handed.close()


class AttachedCprBerth(AttachedBerth):
    """A workload gets the memory of another one, while that one still runs on it."""

    def __init__(self, slot: WorkloadSlot) -> None:
        super().__init__(slot)
        self._taken: AttachedGuest | None = None
        self._declared = b""

    def take(self, handed: HandedMemory) -> None:
        """Check that the guest fits the workload, and map its memory there.

        Raises:
            GuestError: It does not, naming machine, block, or device and field.
        """
        with contextlib.closing(handed):
            told = _told(handed)
            identity = GuestIdentity(machine=told.machine)
            early = declarations_section(told.devices)
            self._declared = early.body
            guest = self._taken = super().allocate(identity, (early,), told.blocks)
            guest.adopt(handed)

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> AttachedGuest:
        """The workload, if the stream is that of the memory which it has.

        Raises:
            GuestError: It is another one's.
        """
        guest = self._taken
        if guest is None:
            raise GuestError("a stream came without its memory: its cpr channel is missing")
        here = [(block.idstr, block.used_length) for block in guest.ram]
        there = [(spec.idstr, spec.used_length) for spec in blocks]
        declared = [item.body for item in early if item.idstr == DECLARATIONS]
        if (identity.machine, there, declared) != (
            guest.identity.machine,
            here,
            [self._declared],
        ):
            raise GuestError("the stream is of another guest than the memory that came before it")
        return guest

    def abandon(self) -> None:
        """Let the workload have empty memory again: what it has is its source's."""
        guest, self._taken = self._taken, None
        if guest is None:
            return
        try:
            guest.renew_memory()
        except GuestError as error:
            log.warning("the workload keeps the source's memory until it ends: %s", error)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the source's daemon says of a workload before anything else comes."""

    machine: str
    devices: list[object]
    blocks: list[RamBlockSpec]


def _told(handed: HandedMemory) -> _Told:
    body = decode_workload_tail(handed.state.tail)
    if body is None:
        raise GuestError("the source does not declare its devices: it is no workload")
    try:
        tree = json.loads(body)
        page_size, devices = tree["page_size"], tree["devices"]
        blocks = [RamBlockSpec(str(name), int(size), page_size) for name, size in tree["blocks"]]
        if isinstance(page_size, int) and isinstance(devices, list):
            return _Told(str(tree["machine"]), devices, blocks)
    except (ValueError, TypeError, KeyError):
        pass
    raise GuestError("what the source says of its workload is not understood")

"""Room for a replica that follows its primary in memory and rests in a directory afterwards.

A checkpoint changes the replica as a whole; in a file, one that was cut short would leave
half of it. So it is written once, when the replica takes over.
"""

import logging
from collections.abc import Sequence

import numpy as np

from migrationd.errors import GuestError, StoreError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.held import HeldGuest
from migrationd.guest.memory import page_runs
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.berth import Berth
from migrationd.store.mapped_ram_reader import Contents

log = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20
"""Pages that go to the file in one go."""


class ReplicaBerth:
    """Such a berth.

    Args:
        memory: Where the replica follows.
        file: Where it rests when it has taken over.
    """

    def __init__(self, memory: Berth, file: Berth) -> None:
        self._memory = memory
        self._file = file

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> HeldGuest:
        """Make it in memory."""
        return self._memory.allocate(identity, early, blocks)

    def adopt(self, fd: int, contents: Contents) -> HeldGuest:
        """As in memory."""
        return self._memory.adopt(fd, contents)

    def settle(self, guest: HeldGuest) -> None:
        """Nothing durable yet: its primary runs."""
        self._memory.settle(guest)

    def abandon(self) -> None:
        """As in memory."""
        self._memory.abandon()

    def take_over(self, replica: HeldGuest) -> HeldGuest:
        """Write the replica, which is the guest from now on; takes as long as the disk does.

        Returns:
            The guest at rest. The one in memory where it cannot be written: its primary is gone,
            and there is no other.
        """
        assert isinstance(replica, ParkedGuest)
        try:
            guest = self._written(replica)
        except (GuestError, StoreError) as error:
            log.error("the replica takes over in memory, not at rest: %s", error)
            return replica
        replica.close()
        return guest

    def _written(self, replica: ParkedGuest) -> ParkedGuest:
        early = [device for device in replica.devices if device.is_early]
        specs = [
            RamBlockSpec(block.idstr, block.used_length, block.page_size) for block in replica.ram
        ]
        guest = self._file.allocate(replica.identity, early, specs)
        assert isinstance(guest, ParkedGuest)
        try:
            for block, origin in zip(guest.ram, replica.ram, strict=True):
                _copy(origin, block)
            rest = [device for device in replica.devices if not device.is_early]
            guest.complete([*early, *rest], replica.vmdescription, replica.seen)
            self._file.settle(guest)
        except BaseException:
            guest.close()
            self._file.abandon()
            raise
        return guest


def _copy(origin: RamBlock, block: RamBlock) -> None:
    rows = origin.memory.view.reshape(-1, origin.page_size)
    most = PIECE_BYTES // origin.page_size
    for first, count in page_runs(np.flatnonzero(origin.present)).tolist():
        for begin in range(first, first + count, most):
            end = min(begin + most, first + count)
            block.place_batch(np.arange(begin, end), rows[begin:end], is_run=True)

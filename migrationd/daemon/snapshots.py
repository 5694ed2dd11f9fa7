"""Snapshots: states of the guest at rest are saved under a tag and taken up again.

As a block node that can hold them QEMU's commands name ``ram-dir``, which is there with the
option ``-ram-dir``.
"""

from collections.abc import Callable, Sequence

from migrationd.daemon.shelter import Shelter
from migrationd.errors import QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import Owner
from migrationd.store.snapshots import Snapshot, Snapshots

NODE = "ram-dir"


class GuestSnapshots:
    """Saved states of the one guest; lives on the event loop.

    Args:
        shelter: Where the guest rests.
        guest: Gives the held guest, or None if there is none.
        is_migrating: Whether a migration is in progress.
        replace: Takes the loaded guest in place of the held one.
    """

    def __init__(
        self,
        shelter: Shelter,
        guest: Callable[[], ParkedGuest | AttachedGuest | None],
        is_migrating: Callable[[], bool],
        replace: Callable[[ParkedGuest], None],
    ) -> None:
        self._shelter = shelter
        self._guest = guest
        self._is_migrating = is_migrating
        self._replace = replace

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes that hold snapshots."""
        return (NODE,) if self._shelter.has_snapshots else ()

    def check_nodes(self, devices: Sequence[str], vmstate: str | None = None) -> None:
        """Refuse nodes that are not there.

        Raises:
            QMPError: With QEMU's text.
        """
        if not devices:
            raise QMPError("At least one device is required for snapshot")
        for device in devices:
            if device not in self.nodes:
                raise QMPError(f"No block device node '{device}'")
        if vmstate is not None and vmstate not in self.nodes:
            raise QMPError(f"vmstate block device '{vmstate}' does not exist")

    async def save(self, tag: str) -> None:
        """Save the guest.

        Raises:
            QMPError: It cannot be saved now.
            StoreError: The tag is taken, or it cannot be stored.
        """
        self._check_rests()
        guest = self._guest()
        if guest is None:
            raise QMPError("There is no guest to save")
        if guest.file is None:
            raise QMPError("Only a guest that rests in -ram-dir can be saved")
        await self._shelter.with_snapshots(lambda snapshots: snapshots.save(tag))

    async def load(self, tag: str) -> None:
        """Take up a saved state; the present one is given up.

        Raises:
            QMPError: The guest cannot be replaced now.
            StoreError: There is no such state, or it cannot be read.
        """
        self._check_rests()

        def load(snapshots: Snapshots) -> ParkedGuest | None:
            snapshots.load(tag)
            return self._shelter.find()

        with self._shelter.occupied("A snapshot is being loaded"):
            guest = await self._shelter.with_snapshots(load)
            assert guest is not None
            self._replace(guest)

    async def delete(self, tag: str) -> None:
        """Remove a saved state; nothing if there is none.

        Raises:
            StoreError: It cannot be removed.
        """
        await self._shelter.with_snapshots(lambda snapshots: snapshots.delete(tag))

    async def list(self) -> list[Snapshot]:
        """All saved states, oldest first; none without a directory.

        Raises:
            StoreError: They cannot be listed.
        """
        if not self.nodes:
            return []
        return await self._shelter.with_snapshots(lambda snapshots: [*snapshots.list()])

    def _check_rests(self) -> None:
        if self._is_migrating():
            raise QMPError("There's a migration process in progress")
        self._shelter.check_free()
        guest = self._guest()
        if isinstance(guest, AttachedGuest):
            raise QMPError("Snapshots of an attached guest are not supported in this version")
        if guest is not None and guest.owner is not Owner.HELD:
            raise QMPError("The guest was handed over; cont takes it back")

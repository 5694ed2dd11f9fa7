"""What one outgoing migration means for the guest it moves: owner, run state, events."""

import logging
from dataclasses import replace

from migrationd.daemon.run_control import RunControl
from migrationd.errors import StoreError
from migrationd.guest.held import HeldGuest
from migrationd.guest.run_state import LazyHandOver, Owner
from migrationd.migration.options import MigrationOptions
from migrationd.outgoing.postcopy_learned import Order
from migrationd.qmp.event_bus import EventBus

log = logging.getLogger(__name__)


class MigrationEvents:
    """MIGRATION and MIGRATION_PASS, as long as the capability ``events`` is on; COLO_EXIT.

    Args:
        bus: Where events go.
        options: Where the capability is.

    Attributes:
        colo_exited: On which side a replica was last given up, and why.
    """

    def __init__(self, bus: EventBus, options: MigrationOptions) -> None:
        self._bus = bus
        self._options = options
        self.colo_exited = "none", "none"

    def status(self, status: str) -> None:
        """Tell of a new status."""
        if self._options.capabilities["events"]:
            self._bus.emit("MIGRATION", {"status": status})

    def dirty_pass(self, number: int) -> None:
        """Tell that a pass over the dirty bitmap began."""
        if self._options.capabilities["events"]:
            self._bus.emit("MIGRATION_PASS", {"pass": number})

    def colo_exit(self, mode: str, reason: str) -> None:
        """Tell that there is no replica any more."""
        self.colo_exited = mode, reason
        self._bus.emit("COLO_EXIT", {"mode": mode, "reason": reason})


class OutgoingObserver:
    """Implements :class:`migrationd.outgoing.contract.Observer` for one migration.

    Args:
        run: Holds the guest.
        events: Told of statuses and passes.
        guest: What is migrated.
        destination: Where to, in words.
        lazy: How, if it is a postcopy that an earlier daemon began.
        gives_memory: Whether the memory itself goes (``cpr-transfer``).
        releases_memory: Whether it is given back when a postcopy is complete (``release-ram``).
            Differs from QEMU, which does so page by page on the way and cannot recover then.
    """

    def __init__(
        self,
        run: RunControl,
        events: MigrationEvents,
        guest: HeldGuest,
        destination: str,
        lazy: LazyHandOver | None = None,
        *,
        gives_memory: bool = False,
        releases_memory: bool = False,
    ) -> None:
        self._run = run
        self._events = events
        self._guest = guest
        self._destination = destination
        self._was_stopped = lazy is not None
        self._lazy = lazy
        self._gives_memory = gives_memory
        self._releases_memory = releases_memory

    def on_status(self, status: str) -> None:
        """Pass it on; a pause before the switchover is one already."""
        if status == "pre-switchover":
            self._run.in_switchover = True
        self._events.status(status)

    def on_pass(self, number: int) -> None:
        """Pass it on."""
        self._events.dirty_pass(number)

    async def hold_still(self) -> None:
        """Keep ``cont`` from letting it go on."""
        await self._run.hold_still()

    def let_go(self) -> None:
        """Let ``cont`` act again."""
        self._run.let_go()

    def on_stopped(self) -> None:
        """Pass it on; the guest is to go on if the migration fails."""
        self._was_stopped = True
        self._run.tell_stopped()

    def on_resumed(self) -> None:
        """Pass it on."""
        self._was_stopped = False
        self._run.tell_resumed()

    def on_colo_exit(self, reason: str) -> None:
        """Pass it on."""
        self._events.colo_exit("primary", reason)

    async def before_switchover(self, lazy: LazyHandOver | None) -> None:
        """Put on record that the guest is being handed over."""
        self._lazy = lazy
        self._run.in_switchover = True
        await self._run.record_owner(self._guest, Owner.HANDING_OVER, self._destination, lazy)

    def running_there(self) -> None:
        """Put on record that the guest must not run here."""
        log.info("the destination runs the guest, its memory follows")
        if self._lazy is None or self._lazy.is_loaded:
            return
        self._lazy = replace(self._lazy, is_loaded=True)
        self._run.record_running_there(self._guest, self._destination, self._lazy)

    def on_learned(self, order: Order) -> None:
        """Keep the order."""
        self._run.learn_order(self._guest, order)

    async def handed_over(self) -> None:
        """Put on record that the guest is elsewhere, as it is whatever the disk says."""
        was_postcopy = self._lazy is not None
        if self._gives_memory or (self._releases_memory and was_postcopy):
            self._run.give_up_memory(self._guest)
        await self._record_end(Owner.HANDED_OVER, self._destination)
        self._run.switchover_over()

    async def kept(self, *, may_be_elsewhere: bool) -> None:
        """Put on record that the guest is held here; let it go on unless it may run elsewhere."""
        if self._run.in_switchover:
            await self._record_end(Owner.HELD, None)
        self._run.switchover_over()
        if self._was_stopped and not may_be_elsewhere:
            await self._run.resume_workload(self._guest)

    async def _record_end(self, owner: Owner, destination: str | None) -> None:
        """Put on record how it ended.

        A disk that cannot take it keeps ``handing-over``, with which the next daemon sends
        nothing before its user has looked.
        """
        try:
            await self._run.record_owner(self._guest, owner, destination)
        except StoreError as error:
            log.error("on record the guest is still being handed over: %s", error)

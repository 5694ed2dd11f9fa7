"""Whether the guest runs, and where: run state, ``stop`` and ``cont``, and who owns it.

A parked guest never executes here; ``stop`` and ``cont`` choose what it does where it goes
next. A workload is stopped and started for real.

Reference: QMP RunState as QEMU 11.1 shows it around a migration.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine

from migrationd.config import DaemonConfig
from migrationd.daemon.shelter import Shelter
from migrationd.errors import GuestError, QMPError, StoreError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import Live
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import PAUSED, PRELAUNCH, RUNNING, LazyHandOver, Owner
from migrationd.outgoing.postcopy_learned import NO_ORDER, Order
from migrationd.qmp.event_bus import EventBus

log = logging.getLogger(__name__)

_DROP_AFTER_S = 0.5


class RunControl:
    """The guest that this process holds.

    Lives on the event loop.

    Args:
        config: Start-up configuration.
        bus: Where events go.
        shelter: Where guests rest.
        spawn: Starts a task that the daemon owns.

    Attributes:
        guest: The held guest.
        expects_guest: Whether one is waited for.
        in_switchover: Whether it is just being handed over.
        is_held_still: Whether a migration wants it to stand still.
        chosen_run_state: What ``stop`` or ``cont`` chose for a guest that is not here yet.
    """

    def __init__(
        self,
        config: DaemonConfig,
        bus: EventBus,
        shelter: Shelter,
        spawn: Callable[[Coroutine[None, None, None] | asyncio.Future[None]], None],
    ) -> None:
        self.guest: HeldGuest | None = None
        self.expects_guest = bool(config.incoming)
        self.in_switchover = False
        self.is_held_still = False
        self._changing = asyncio.Lock()
        self.chosen_run_state: str | None = None
        self._config = config
        self._bus = bus
        self._shelter = shelter
        self._spawn = spawn

    def run_state(self, *, is_arriving: bool) -> str:
        """QMP RunState. A held guest is paused: it never executes here.

        Args:
            is_arriving: Whether a guest is ours whose memory is still on the way.
        """
        if self.guest is None:
            if is_arriving:
                return PAUSED
            return "inmigrate" if self.expects_guest else "prelaunch"
        if self.in_switchover:
            return "finish-migrate"
        if self.guest.owner is not Owner.HELD:
            return "postmigrate"
        if self.running:
            return RUNNING
        live = self.guest.live
        return PRELAUNCH if live is not None and live.never_ran else PAUSED

    @property
    def running(self) -> bool:
        """Whether the guest executes here: a parked one never does."""
        live = self.guest.live if self.guest is not None else None
        return live is not None and live.is_running

    def tell_stopped(self) -> None:
        """Tell that the guest was stopped."""
        self._bus.emit("STOP", None)

    def tell_resumed(self) -> None:
        """Tell that the guest runs again."""
        self._bus.emit("RESUME", None)

    async def hold_still(self) -> None:
        """Let nobody start the guest from here on; who is just doing so ends first."""
        async with self._changing:
            self.is_held_still = True

    def let_go(self) -> None:
        """Let ``cont`` act again."""
        self.is_held_still = False

    def switchover_over(self) -> None:
        """No migration has to do with the guest any more."""
        self.in_switchover = False
        self.let_go()

    async def stop(self) -> None:
        """Stop the guest; of a parked one, choose that it is stopped where it goes next.

        Raises:
            GuestError: A workload does not stop.
            StoreError: The choice cannot be put on record, and is not made.
        """
        async with self._changing:
            live = self.guest.live if self.guest is not None else None
            if live is None:
                await self._choose(PAUSED, "STOP")
            elif await asyncio.to_thread(live.stop):
                self.tell_stopped()

    async def cont(self) -> None:
        """Let the guest run: a workload here, a parked one where it goes next.

        Takes a handed-over guest back.

        Raises:
            QMPError: It has no memory any more, or a migration wants it to stand still.
            StoreError: It cannot be put on record that it is here again, and so it is not.
            GuestError: It does not start.
        """
        async with self._changing:
            await self._cont()

    async def _cont(self) -> None:
        guest = self.guest
        if self.is_held_still:
            raise QMPError("Migration is not finalized yet")
        if guest is not None and not guest.has_memory:
            raise QMPError("The guest's memory itself went to the destination, none is left here")
        if guest is not None and guest.owner is not Owner.HELD:
            await self._shelter.record_owner(guest, Owner.HELD, None)
            log.warning("the guest is taken back: it must not run at the destination any more")
            guest.owner = Owner.HELD
            if isinstance(guest, ParkedGuest):
                await self._record_next_run_state(guest, RUNNING)
                self.tell_resumed()
                return
        live = guest.live if guest is not None else None
        if live is None:
            await self._choose(RUNNING, "RESUME")
        else:
            await self._let_run(live)

    async def _let_run(self, live: Live) -> None:
        """Let a workload run, and tell if it stood still until now.

        Raises:
            GuestError: It does not start; one that is silent counts as running all the same.
        """
        try:
            has_started = await asyncio.to_thread(live.start)
        except GuestError:
            if live.is_running:
                self.tell_resumed()
            raise
        if has_started:
            self.tell_resumed()

    async def _choose(self, run_state: str, event: str) -> None:
        guest = self.guest
        if not isinstance(guest, ParkedGuest):
            self.chosen_run_state = run_state
            return
        was_running = guest.next_run_state == RUNNING
        await self._record_next_run_state(guest, run_state)
        if was_running != (run_state == RUNNING):
            self._bus.emit(event, None)

    async def _record_next_run_state(self, guest: ParkedGuest, run_state: str) -> None:
        """Choose it once that is on stable storage: who is told of it may rely on it."""
        await self._shelter.record_run_state(run_state)
        guest.choose_run_state(run_state)

    def set_next_run_state(self, guest: ParkedGuest, run_state: str) -> None:
        """Put on record what a parked guest does where it goes next."""
        guest.choose_run_state(run_state)
        self._keep_record(self._shelter.record_run_state(run_state))

    async def resume_workload(self, guest: HeldGuest) -> None:
        """Let a workload go on that was stopped for a migration which failed."""
        if guest.live is None:
            return
        try:
            await self._let_run(guest.live)
        except GuestError as error:
            log.error("the workload does not go on: %s", error)

    async def runs_lazily(self, guest: AttachedGuest) -> None:
        """Hold a workload, and let it run, whose memory is still on the way."""
        self.guest = guest
        self.expects_guest = False
        await self._start_arrived(guest)

    async def arrived(self, guest: HeldGuest) -> None:
        """Hold a guest that has just come, or is whole now."""
        was_here = self.guest is guest
        self.guest = guest
        self.expects_guest = False
        if isinstance(guest, AttachedGuest):
            if not was_here:
                await self._start_arrived(guest)
        elif self.chosen_run_state is not None:
            self.set_next_run_state(guest, self.chosen_run_state)
        self._spawn(asyncio.to_thread(_look_at, guest))

    async def _start_arrived(self, guest: AttachedGuest) -> None:
        """Let a workload run that arrived, as it did at its source."""
        wanted = self.chosen_run_state or guest.next_run_state
        if wanted == RUNNING and self._config.start_stopped and self.chosen_run_state is None:
            wanted = PAUSED
        if wanted != RUNNING:
            guest.never_ran = wanted == PRELAUNCH
            return
        try:
            await self._let_run(guest)
        except GuestError as error:
            log.error("the workload arrived, but does not start: %s", error)

    async def record_owner(
        self,
        guest: HeldGuest,
        owner: Owner,
        destination: str | None,
        lazy: LazyHandOver | None = None,
    ) -> None:
        """Put on record who owns the guest; a template stays what it is, its clone is recorded.

        Raises:
            StoreError: It cannot be put on record.
        """
        if self._config.keep:
            if owner is Owner.HANDING_OVER and lazy is not None and destination is not None:
                await self._shelter.record_clone(destination, lazy)
            else:
                await self._shelter.forget_clone()
            return
        guest.owner = owner
        await self._shelter.record_owner(guest, owner, destination, lazy)

    def give_up_memory(self, guest: HeldGuest) -> None:
        """Let the guest's memory go, which the destination has: nothing can be taken back."""
        guest.has_memory = False
        self._spawn(self._drop_memory(guest))

    async def _drop_memory(self, guest: HeldGuest) -> None:
        # To unmap gigabytes takes time that the destination needs now.
        await asyncio.sleep(_DROP_AFTER_S)
        try:
            await asyncio.to_thread(guest.give_up_memory)
        except GuestError as error:
            log.error("the workload keeps memory that is the destination's now: %s", error)

    def record_running_there(self, guest: HeldGuest, destination: str, lazy: LazyHandOver) -> None:
        """Put on record that the destination of a postcopy has loaded the guest."""
        # Handed to the writer now: it keeps the order of the calls.
        if self._config.keep:
            self._keep_record(self._shelter.record_clone(destination, lazy))
        else:
            self._keep_record(self._shelter.record_owner(guest, guest.owner, destination, lazy))

    def _keep_record(self, written: "asyncio.Future[None]") -> None:
        """Let a record be written that nobody waits for: the one before it is safe as well."""

        async def log_failure() -> None:
            try:
                await written
            except StoreError as error:
                log.error("the record beside the guest is not up to date: %s", error)

        self._spawn(log_failure())

    def learned_order(self) -> Order | None:
        """In which order the guest asks for its pages, empty if unknown; None if unwanted."""
        if not self._config.learn_order or not isinstance(self.guest, ParkedGuest):
            return None
        if self.guest.page_order is None:
            self.guest.page_order = self._shelter.read_order(self.guest)
        return NO_ORDER if self.guest.page_order is None else self.guest.page_order

    def learn_order(self, guest: HeldGuest, order: Order) -> None:
        """Keep the order in which a guest asked for its pages, if that is wanted."""
        if self._config.learn_order and isinstance(guest, ParkedGuest) and len(order):
            guest.page_order = order
            self._spawn(self._shelter.record_order(guest, order))


def _look_at(guest: HeldGuest) -> None:
    """Say what has come, and give back what it does not need; may take a while."""
    log.info(
        "holding guest %s: %d RAM blocks, %d MiB of RAM, %d MiB of it not zero, %d device sections",
        guest.identity.machine or "without a machine type",
        len(guest.ram),
        guest.ram_bytes >> 20,
        guest.present_bytes >> 20,
        len(guest.devices),
    )
    guest.give_back_zeros()

"""The source side: what happens to one outgoing migration, whoever makes it happen.

    setup           connecting; then the head of the stream and the block list
    active          RAM goes out
    pre-switchover  only with pause-before-switchover, until migrate-continue
    device          device state goes out, then the destination's SHUT 0 is awaited
    completed       the destination holds the guest

    postcopy-device         instead: the destination loads the devices, to run the guest
    postcopy-active         it runs the guest, and memory follows
    postcopy-paused         the connection was lost; ``resume`` gives another one
    postcopy-recover-setup  connecting; postcopy-recover: agreeing on who has which page

The order on the wire is :mod:`migrationd.outgoing.phases`; what moves bytes runs on threads of
a connection, and the return path is a coroutine beside it. A blocked thread ends
because its channel is shut down.

Reference: QEMU's source; sequences in stream format 6.1-6.3, events in QEMU 11.1's order.
"""

import asyncio
import logging

from migrationd.clock import Clock
from migrationd.errors import (
    ChannelError,
    InvalidState,
    MigrationdError,
    MigrationError,
    PeerFailed,
    WorkloadGone,
    forget_frames,
)
from migrationd.guest.base import Guest
from migrationd.migration.dialect import Dialect
from migrationd.migration.info import MigrationInfo
from migrationd.migration.status import Cause, Role, StatusMachine
from migrationd.outgoing.background_snapshot import SnapshotPhases
from migrationd.outgoing.colo import ColoPhases
from migrationd.outgoing.connection import OutgoingConnection
from migrationd.outgoing.contract import Observer, OutgoingSettings
from migrationd.outgoing.phases import Phases
from migrationd.outgoing.postcopy import OpenChannel
from migrationd.outgoing.progress import POSTCOPY_STATUSES
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

_NEEDS_GUEST = ("setup", "active", "pre-switchover")
"""Statuses in which the guest's process has still to answer."""

PAUSABLE = ("postcopy-active", "postcopy-recover")
"""Statuses in which ``migrate-pause`` is possible."""


class OutgoingMigration:
    """One outgoing migration of a held guest.

    Lives on the event loop; :meth:`run` is one task owned by the daemon.

    Args:
        guest: The guest; only read.
        dialect: Wire dialect of the guest.
        settings: Capabilities and parameters.
        clock: Time.
        observer: Told of statuses, passes and the points of no return.
    """

    def __init__(
        self,
        guest: Guest,
        dialect: Dialect,
        settings: OutgoingSettings,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._observer = observer
        self._status = StatusMachine(Role.OUTGOING, observer.on_status)
        kind = SnapshotPhases if settings.background_snapshot else Phases
        if settings.checkpoint_delay_ms is not None:
            kind = ColoPhases
        self._phases = kind(guest, dialect, settings, clock, observer, self._status)
        self._progress = self._phases.progress
        self._postcopy = self._phases.postcopy
        self._shows_latency = settings.postcopy_blocktime
        self._connection: OutgoingConnection | None = None
        self._resumed: asyncio.Future[OpenChannel] | None = None
        self._work: asyncio.Task[None] | None = None
        self._opening: asyncio.Future[Channel] | None = None
        self._is_yanked = False
        self._loss: WorkloadGone | None = None
        self._may_have_package = False

    @property
    def status(self) -> str:
        """Outgoing MigrationStatus."""
        return self._status.status

    @property
    def is_running(self) -> bool:
        """Whether it is still in progress, clean-up included."""
        return self._status.is_running

    @property
    def error(self) -> MigrationdError | None:
        """Why it failed."""
        return self._progress.error

    @property
    def may_be_elsewhere(self) -> bool:
        """Whether the whole guest was on its way, and the destination did not say it failed."""
        if self._phases.keeps_guest:
            return False
        return self._phases.tail_started.is_set() and not isinstance(self.error, PeerFailed)

    def begin(self) -> None:
        """Enter ``setup``."""
        self._status.advance(Cause.START)

    async def run(self, open_channel: OpenChannel | None) -> None:
        """Carry the migration to its end; never raises for a failed migration.

        Args:
            open_channel: Connects to the destination; called again for further channels. None
                if an earlier daemon began it: it waits in ``postcopy-paused`` to be resumed.
        """
        work = self._work = asyncio.create_task(self._migrate(open_channel), name="outgoing")
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError:
            self.cancel()
            if self.is_in_postcopy:
                work.cancel()
            await asyncio.wait((work,))
        if work.cancelled():
            if self.is_in_postcopy:
                log.warning("the guest's memory is not all at its destination, which runs it")
            else:
                await self._settle(None)
        elif (error := work.exception()) is not None:
            await self._settle(error)
            # Both hold on to what was sent when it failed: a guest that ends must be given back.
            self._work = None
            forget_frames(error)

    async def _settle(self, error: BaseException | None) -> None:
        """Come to rest after an error, or after the task was cancelled: the guest stays here."""
        if self._status.status == "cancelling":
            await self._settle_cancel()
        elif self._loss is not None:
            await self._settle_failure(self._loss)
        elif error is None:
            await self._settle_cancel()
        elif isinstance(error, MigrationdError):
            await self._settle_failure(error)
        else:
            log.error("internal error in the outgoing migration", exc_info=error)
            await self._settle_failure(MigrationError(f"internal error: {error!r}"))

    def cancel(self) -> None:
        """Cancel as ``migrate_cancel`` does: status ``cancelling`` now, the rest follows.

        Does nothing when there is nothing to cancel.
        """
        if not self._status.can(Cause.CANCEL):
            return
        if self.status == "pre-switchover":
            self._progress.error = MigrationError("Switchover is interrupted")
        self._status.advance(Cause.CANCEL)
        self._interrupt()

    def lose_guest(self) -> None:
        """The process that is the guest has ended: one that was not sent yet cannot be.

        Nothing where its devices and memory are here already: what is on its way arrives.
        """
        if self.status in _NEEDS_GUEST and not self._phases.outlives_guest:
            self._loss = WorkloadGone()
            self._interrupt()

    @property
    def is_in_postcopy(self) -> bool:
        """Whether the destination runs the guest, or may run it, without all of its memory."""
        return self._status.status in POSTCOPY_STATUSES

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as possible; nothing without the capability."""
        if self._postcopy is not None:
            self._postcopy.request()

    def pause(self) -> None:
        """Break the connection of a postcopy, to be resumed over another one.

        Raises:
            InvalidState: There is none.
        """
        if self.status not in PAUSABLE:
            raise InvalidState(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )
        if self._connection is not None:
            self._connection.break_off()

    def yank(self) -> None:
        """Cut all connections off: the migration fails, a postcopy is paused, or stays so."""
        if self._connection is not None:
            self._connection.break_off()
        elif self._opening is not None:
            self._is_yanked = self._opening.cancel()
        elif self._work is None:
            self._is_yanked = True

    def resume(self, open_channel: OpenChannel) -> None:
        """Go on from ``postcopy-paused`` over a new connection.

        Args:
            open_channel: Connects to the destination; called again for further channels.

        Raises:
            InvalidState: Nothing is paused.
        """
        if self.status != "postcopy-paused" or self._resumed is None or self._resumed.done():
            raise InvalidState("Cannot resume if there is no paused migration")
        self._status.advance(Cause.RECOVER_SETUP)
        self._resumed.set_result(open_channel)

    @property
    def may_be_taken_back(self) -> bool:
        """Whether a paused postcopy may be given up.

        Its destination never said that it runs the guest; or it runs a clone of a template: the
        clone is lost then, but there is never a second owner.
        """
        postcopy = self._postcopy
        is_paused = self.status == "postcopy-paused" and self._resumed is not None
        return (
            is_paused
            and postcopy is not None
            and (postcopy.settings.is_clone or not postcopy.is_loaded)
        )

    def take_back(self) -> None:
        """Give a paused postcopy up: somebody knows that the destination does not run the guest.

        Raises:
            InvalidState: It does, or nothing is paused.
        """
        if not self.may_be_taken_back or self._resumed is None or self._resumed.done():
            raise InvalidState("Migration is not finalized yet")
        self._status.advance(Cause.FAIL)
        self._resumed.set_exception(MigrationError("the guest was taken back"))

    @property
    def is_continued(self) -> bool:
        """Whether ``pre-switchover`` is at its end, though the status says so a moment later."""
        return self._phases.is_continued

    def continue_switchover(self) -> None:
        """Go on from ``pre-switchover``."""
        self._phases.continue_switchover()

    def set_max_bandwidth(self, bytes_per_s: int) -> None:
        """Change the limit at once; 0 is unlimited."""
        self._phases.set_max_bandwidth(bytes_per_s)

    def set_max_postcopy_bandwidth(self, bytes_per_s: int) -> None:
        """Change the limit of the background push at once; 0 is unlimited."""
        if self._postcopy is not None:
            self._postcopy.pacer.set_rate(bytes_per_s)

    def set_downtime_limit(self, limit_ms: int) -> None:
        """Change the limit that the expected downtime starts from."""
        self._phases.downtime_limit_ms = limit_ms

    def set_avail_switchover_bandwidth(self, bytes_per_s: int) -> None:
        """Change the rate that the switchover is planned with; 0 is the measured one."""
        self._phases.available_bytes_per_s = bytes_per_s

    def set_checkpoint_delay(self, delay_ms: int) -> None:
        """Change the time between two checkpoints from the next one on."""
        self._phases.checkpoint_delay_ms = delay_ms

    def give_up_replica(self) -> None:
        """``x-colo-lost-heartbeat``; only in status ``colo``."""
        assert isinstance(self._phases, ColoPhases)
        self._phases.give_up_replica()

    def set_xbzrle_cache_size(self, size_bytes: int) -> None:
        """Change the cache at once; what it held is forgotten."""
        self._phases.xbzrle_cache_bytes = size_bytes

    def info(self) -> MigrationInfo | None:
        """The source's part of ``query-migrate``; None before anything happened."""
        shows_latency = self._postcopy is not None and self._shows_latency
        return self._progress.info(
            self.status,
            downtime_limit_ms=self._phases.downtime_limit_ms,
            stall=self._phases.stall,
            latency=self._postcopy.latency if self._postcopy and shows_latency else None,
        )

    async def _migrate(self, open_channel: OpenChannel | None) -> None:
        failure: MigrationdError | None
        if open_channel is None:
            assert self._postcopy is not None
            self._postcopy.continue_counting()
            failure = MigrationError("the daemon that sent the guest ended before its memory did")
        else:
            failure = await self._attempt(open_channel, is_recovery=False)
        while failure is not None:
            opener = await self._paused(failure)
            failure = await self._attempt(opener, is_recovery=True)

    async def _paused(self, failure: MigrationdError) -> OpenChannel:
        """Wait in ``postcopy-paused`` for another connection."""
        self._progress.error = failure
        log.error("the migration is paused: %s", failure)
        self._resumed = asyncio.get_running_loop().create_future()
        self._status.advance(Cause.PAUSE)
        return await self._resumed

    async def _attempt(
        self, open_channel: OpenChannel, *, is_recovery: bool
    ) -> MigrationdError | None:
        """Try one connection.

        Returns:
            None when the migration is complete; what broke a postcopy that can be resumed.

        Raises:
            Exception: What broke a migration whose guest stays here.
        """
        try:
            await self._stream(open_channel, is_recovery=is_recovery)
        except Exception as error:
            if not self._may_run_there(error):
                raise
            if isinstance(error, MigrationdError):
                return error
            log.error("internal error in the outgoing migration", exc_info=error)
            return MigrationError(f"internal error: {error!r}")
        return None

    def _may_run_there(self, error: Exception) -> bool:
        """Whether the destination may run the guest after a connection ended with an error."""
        if self._postcopy is None or self.status == "cancelling":
            return False
        if self._postcopy.is_loaded or self.status != "postcopy-device":
            return self.is_in_postcopy
        has_refused = isinstance(error, PeerFailed)
        return self._may_have_package and not has_refused

    async def _stream(self, open_channel: OpenChannel, *, is_recovery: bool) -> None:
        """Carry one connection from its beginning to its end."""
        phases = self._phases
        self._may_have_package = False
        channel = await self._open(open_channel)
        connection = OutgoingConnection(channel, open_channel, phases.tail_started)
        self._connection = connection
        try:
            if phases.has_return_path and not channel.is_duplex:
                name = "return-path" if self._postcopy is None else "postcopy-ram"
                raise ChannelError(
                    f"this transport has no way back for the {name} capability; turn it off"
                )
            phases.use(connection, is_recovery=is_recovery)
            await connection.stream(
                phases.recover if is_recovery else phases.send,
                has_return_path=phases.has_return_path,
            )
            await phases.complete()
        finally:
            connection.shutdown()
            await phases.unthrottle()
            await connection.aclose()
            phases.ended()
            self._may_have_package = connection.may_have_package
            self._connection = None

    async def _open(self, open_channel: OpenChannel) -> Channel:
        """Connect, unless the attempt is cut off, which ends no more than the attempt."""
        opening = self._opening = asyncio.ensure_future(open_channel())
        try:
            if self._is_yanked or self._loss is not None or self.status == "cancelling":
                # It was before this began. What is open already comes at once, to be closed.
                await asyncio.wait((opening,), timeout=0)
                opening.cancel()
                await asyncio.wait((opening,))
                raise asyncio.CancelledError
            return await opening
        except asyncio.CancelledError:
            if not opening.cancel() and not opening.cancelled() and not opening.exception():
                opening.result().close()
            if not self._is_yanked:
                raise
            raise ChannelError("the connection was cut off by yank") from None
        finally:
            self._opening = None
            self._is_yanked = False

    def _interrupt(self) -> None:
        self._phases.interrupt()
        connection = self._connection
        if connection is not None:
            connection.cancel()
        if self._work is not None and (connection is None or connection.is_connecting):
            self._work.cancel()

    def _warn_of_two_owners(self) -> None:
        if self.may_be_elsewhere:
            log.warning(
                "the whole guest was on its way when the migration ended without the "
                "destination's word: the destination may run it; do not run both"
            )

    async def _settle_cancel(self) -> None:
        self._warn_of_two_owners()
        await self._observer.kept(may_be_elsewhere=self.may_be_elsewhere)
        self._status.advance(Cause.CLEANED_UP)
        log.info("migration cancelled")

    async def _settle_failure(self, error: MigrationdError) -> None:
        self._progress.error = error
        log.error("migration failed: %s", error)
        self._warn_of_two_owners()
        if self._status.can(Cause.FAIL):
            self._status.advance(Cause.FAIL)
        await self._observer.kept(may_be_elsewhere=self.may_be_elsewhere)
        self._status.advance(Cause.CLEANED_UP)

"""The outgoing half of the control: what is sent where, and what may begin.

Implements :class:`migrationd.qmp.context.OutgoingControl`.

Reference: order of checks and texts of QEMU 11.1 (``migrate``).
"""

import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from uuid import UUID

from migrationd.clock import Clock
from migrationd.config import DaemonConfig
from migrationd.daemon.incoming_control import IncomingControl
from migrationd.daemon.outgoing_observer import MigrationEvents, OutgoingObserver
from migrationd.daemon.run_control import RunControl
from migrationd.daemon.settings import number, outgoing_settings
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.tls import MigrationTls
from migrationd.errors import MigrationdError, QMPError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.run_state import LazyHandOver, Owner
from migrationd.migration.dialect import dialect_of
from migrationd.migration.info import MigrationInfo
from migrationd.migration.options import MigrationOptions
from migrationd.migration.transports import check_mode, check_transport
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.cpr import OpenChannel, after_hand_over
from migrationd.outgoing.driver import PAUSABLE, OutgoingMigration
from migrationd.outgoing.postcopy_source import PostcopySettings
from migrationd.qmp.context import FdLookup, MigrationChannel
from migrationd.transport.address import Address, describe
from migrationd.transport.channel import Channel
from migrationd.transport.connect import connect, is_opened_now, open_now
from migrationd.transport.cpr_channel import CprSender

log = logging.getLogger(__name__)


class OutgoingControl:
    """At most one outgoing migration at a time; lives on the event loop.

    Args:
        config: Start-up configuration.
        options: Capabilities and parameters.
        clock: Time.
        shelter: Where the guest rests.
        run: Holds the guest.
        events: Told of statuses and passes.
        tls: Encrypts connections.
        incoming: The other half: a guest whose memory is still coming does not leave.
        blockers: Gives the names of devices with which the guest cannot migrate.
        uuid: Gives the guest's UUID, or None.
        spawn: Owns the task that sends.

    Attributes:
        migration: The last one that was begun.
    """

    def __init__(
        self,
        config: DaemonConfig,
        options: MigrationOptions,
        clock: Clock,
        shelter: Shelter,
        run: RunControl,
        events: MigrationEvents,
        tls: MigrationTls,
        incoming: IncomingControl,
        *,
        blockers: Callable[[], Sequence[str]],
        uuid: Callable[[], UUID | None],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._config = config
        self._options = options
        self._clock = clock
        self._shelter = shelter
        self._run = run
        self._events = events
        self._tls = tls
        self._incoming = incoming
        self._blockers = blockers
        self._uuid = uuid
        self._spawn = spawn
        self._leaving: set[HeldGuest] = set()
        self.migration: OutgoingMigration | None = None

    def lose(self, guest: HeldGuest) -> bool:
        """A workload is gone.

        Returns:
            Whether a migration of it has not ended: it lets go of the guest.
        """
        if guest not in self._leaving:
            return False
        if self.migration is not None:
            self.migration.lose_guest()
        return True

    def migrate(self, channels: Sequence[MigrationChannel], *, resume: bool, fds: FdLookup) -> None:
        """Start an outgoing migration; it goes on as a task.

        Raises:
            QMPError: The state forbids it.
            ChannelError: A file, command or descriptor cannot be opened.
        """
        address = next(item.address for item in channels if item.channel_type == "main")
        capabilities, parameters = self._options.capabilities, self._options.parameters
        check_transport(address, capabilities, parameters)
        cpr = next((item.address for item in channels if item.channel_type == "cpr"), None)
        if parameters["mode"] == "cpr-transfer" and cpr is None:
            raise QMPError("missing 'cpr' migration channel")
        if resume:
            self._resume(address, fds)
            return
        if self.migration is not None and self.migration.is_running:
            raise QMPError("There's a migration process in progress")
        guest = self._run.guest
        if guest is None:
            if self._run.expects_guest:
                raise QMPError("Guest is waiting for an incoming migration")
            raise QMPError("There is no guest to migrate: start with -incoming or a guest at rest")
        self._shelter.check_free()
        if guest.owner is not Owner.HELD:
            raise QMPError("Can't migrate the vm that was paused due to previous migration")
        incoming = self._incoming.migration
        if incoming is not None and incoming.is_running:
            raise QMPError("Guest's memory is still on its way here")
        if blockers := self._blockers():
            raise QMPError(f"State blocked by non-migratable device '{blockers[-1]}'")
        check_mode(capabilities, parameters)
        self._options.check_built()
        if not capabilities["x-ignore-shared"]:
            _check_has_all(guest)
        settings = self._settings()
        if settings.hands_memory_over and self._config.keep:
            raise QMPError("A template (-keep) cannot give its memory away by cpr-transfer")
        migration = OutgoingMigration(
            guest,
            dialect_of(guest.identity.machine, guest.seen),
            settings,
            self._clock,
            OutgoingObserver(
                self._run,
                self._events,
                guest,
                describe(address),
                gives_memory=settings.hands_memory_over and guest.shares_memory,
                releases_memory=capabilities["release-ram"]
                and guest.file is None
                and not self._config.keep,
            ),
        )
        self.migration = migration
        migration.begin()
        try:
            keep = guest.file.identity if guest.file is not None else None
            open_channel = self._opener(address, fds, keep)
            if settings.hands_memory_over:
                assert cpr is not None
                open_channel = after_hand_over(guest, CprSender(cpr), open_channel)
        except MigrationdError as error:
            failure = error
            self._carry(migration, guest, lambda: _fail(failure))
            raise
        self._carry(migration, guest, open_channel)

    def _carry(
        self, migration: OutgoingMigration, guest: HeldGuest, open_channel: OpenChannel | None
    ) -> None:
        """Let a migration run; a workload that died on the way is let go behind it."""
        self._leaving.add(guest)

        async def run() -> None:
            try:
                await migration.run(open_channel)
            finally:
                self._leaving.discard(guest)
                if isinstance(guest, AttachedGuest) and self._run.guest is not guest:
                    guest.close()

        self._spawn(run())

    def _opener(self, address: Address, fds: FdLookup, keep: tuple[int, int] | None) -> OpenChannel:
        """What opens the main channel; what is opened at once is open when this returns."""
        if not is_opened_now(address):
            return self._tls.outgoing(lambda: connect(address), address)
        channel = open_now(address, fds, keep=keep)
        return self._tls.outgoing(lambda: _ready(channel), address)

    def _resume(self, address: Address, fds: FdLookup) -> None:
        if self.migration is None or self.migration.status != "postcopy-paused":
            raise QMPError("Cannot resume if there is no paused migration")
        self.migration.resume(self._opener(address, fds, None))

    def resume_lazy(self, guest: HeldGuest, lazy: LazyHandOver) -> None:
        """Go on with a postcopy that an earlier daemon began: it waits to be resumed."""
        self._run.in_switchover = True
        observer = OutgoingObserver(self._run, self._events, guest, "its destination", lazy)
        settings = replace(
            self._settings(),
            postcopy=PostcopySettings(
                preempt=lazy.preempt, is_loaded=lazy.is_loaded, is_clone=self._config.keep
            ),
        )
        dialect = dialect_of(guest.identity.machine, guest.seen)
        self.migration = OutgoingMigration(guest, dialect, settings, self._clock, observer)
        self._carry(self.migration, guest, None)

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``.

        Raises:
            QMPError: Postcopy is off, or nothing was migrated yet.
        """
        capabilities = self._options.capabilities
        if not (capabilities["postcopy-ram"] or capabilities["dirty-bitmaps"]):
            raise QMPError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self.migration is None:
            raise QMPError("Postcopy must be started after migration has been started")
        self.migration.start_postcopy()

    def pause(self) -> bool:
        """``migrate-pause``: end the connections of a postcopy.

        Returns:
            False if there is none, or none that is connected.
        """
        if self.migration is None or self.migration.status not in PAUSABLE:
            return False
        self.migration.pause()
        return True

    def take_back(self) -> None:
        """``cont`` during a switchover: give a postcopy up that its destination does not run.

        Raises:
            QMPError: It may run there, or its state is just leaving.
        """
        if self.migration is None or not self.migration.may_be_taken_back:
            raise QMPError("Migration is not finalized yet")
        log.warning("the guest is taken back: it must not run at the destination")
        self.migration.take_back()

    def abort(self) -> None:
        """Cancel what can be cancelled; the process ends."""
        if self.migration is not None:
            self.migration.cancel()

    def cancel(self) -> None:
        """``migrate_cancel``: succeeds also when there is nothing to cancel.

        Raises:
            QMPError: The destination runs the guest.
        """
        if self.migration is not None:
            if self.migration.is_in_postcopy:
                raise QMPError("Postcopy migration in progress, cannot cancel.")
            self.migration.cancel()

    def continue_from(self, state: str) -> None:
        """``migrate-continue``.

        Raises:
            QMPError: The migration is in another state.
        """
        status = self.migration.status if self.migration is not None else "none"
        if self.migration is not None and status == "pre-switchover" == state:
            if not self.migration.is_continued:
                self.migration.continue_switchover()
                return
            status = "device"
        if status != state:
            raise QMPError(f"Migration not in expected state: {status}")

    def check_capabilities_may_change(self) -> None:
        """Capabilities stay as they are while an outgoing migration runs.

        Raises:
            QMPError: One runs.
        """
        if self.migration is not None and self.migration.is_running:
            raise QMPError("There's a migration process in progress")

    def parameters_changed(self) -> None:
        """Make changed parameters take effect on a running migration."""
        if self.migration is not None:
            parameters = self._options.parameters
            self.migration.set_max_bandwidth(number(parameters["max-bandwidth"]))
            self.migration.set_downtime_limit(number(parameters["downtime-limit"]))
            self.migration.set_avail_switchover_bandwidth(
                number(parameters["avail-switchover-bandwidth"])
            )
            self.migration.set_xbzrle_cache_size(number(parameters["xbzrle-cache-size"]))
            self.migration.set_checkpoint_delay(number(parameters["x-checkpoint-delay"]))
            self.migration.set_max_postcopy_bandwidth(number(parameters["max-postcopy-bandwidth"]))

    def info(self) -> MigrationInfo | None:
        """The source's part of ``query-migrate``."""
        return self.migration.info() if self.migration is not None else None

    def _settings(self) -> OutgoingSettings:
        return outgoing_settings(
            self._options,
            self._uuid(),
            starts_postcopy_at_once=self._config.start_postcopy,
            is_clone=self._config.keep,
            compress_level=self._config.compress_level,
            learned=self._run.learned_order(),
        )


async def _ready(channel: Channel) -> Channel:
    return channel


async def _fail(error: MigrationdError) -> Channel:
    raise error


def _check_has_all(guest: HeldGuest) -> None:
    for block in guest.ram:
        if block.is_elsewhere:
            raise QMPError(
                f"The memory of RAM block '{block.idstr}' is in a file that was shared with its "
                "source: turn x-ignore-shared on"
            )

"""The incoming half of the control: listener, loading, recovery.

Implements :class:`migrationd.qmp.context.IncomingControl`.

Reference: order of checks and texts of QEMU 11.1 (``migrate-incoming``, ``migrate-recover``).
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

from migrationd.config import DaemonConfig
from migrationd.daemon.outgoing_observer import MigrationEvents
from migrationd.daemon.replica_berth import ReplicaBerth
from migrationd.daemon.run_control import RunControl
from migrationd.daemon.settings import incoming_settings
from migrationd.daemon.shelter import Shelter
from migrationd.daemon.tls import MigrationTls
from migrationd.errors import QMPError
from migrationd.guest.held import HeldGuest
from migrationd.incoming.berth import Berth, IncomingSettings
from migrationd.incoming.cpr import CprArrival
from migrationd.incoming.driver import IncomingMigration
from migrationd.migration.info import MigrationInfo
from migrationd.migration.options import MigrationOptions
from migrationd.migration.transports import check_transport
from migrationd.qmp.context import FdLookup, MigrationChannel
from migrationd.transport.address import Address
from migrationd.transport.cpr_channel import CprListener, listen_cpr
from migrationd.transport.listen import listen


class IncomingControl:
    """At most one incoming migration at a time; lives on the event loop.

    Args:
        config: Start-up configuration.
        options: Capabilities and parameters.
        shelter: Where guests rest.
        run: Takes the guest that arrived.
        events: Told of statuses.
        tls: Encrypts connections.
        spawn: Owns the task that loads.
        on_fatal: Called when a failure, which was logged, ends the process with status 1.

    Attributes:
        migration: The last one that was begun.
    """

    def __init__(
        self,
        config: DaemonConfig,
        options: MigrationOptions,
        shelter: Shelter,
        run: RunControl,
        events: MigrationEvents,
        tls: MigrationTls,
        *,
        spawn: Callable[[Coroutine[None, None, None]], None],
        on_fatal: Callable[[], None],
    ) -> None:
        self._config = config
        self._options = options
        self._shelter = shelter
        self._run = run
        self._events = events
        self._tls = tls
        self._spawn = spawn
        self._on_fatal = on_fatal
        self._is_started = False
        self._cpr: CprListener | None = None
        self.migration: IncomingMigration | None = None

    @property
    def owns_guest(self) -> bool:
        """Whether a source has given its guest up, which may still lack memory here."""
        return self.migration is not None and self.migration.owns_guest

    def info(self) -> MigrationInfo | None:
        """The destination's part of ``query-migrate``."""
        return self.migration.info() if self.migration is not None else None

    def check_may_start(self) -> None:
        """One incoming migration at a time, and only into a process that waits for it.

        Raises:
            QMPError: None can begin now.
        """
        if self._is_started:
            raise QMPError("The incoming migration has already been started")
        if self._run.run_state(is_arriving=self.owns_guest) != "inmigrate":
            raise QMPError("'-incoming' was not specified on the command line")
        self._shelter.check_free()

    async def start(
        self, channels: Sequence[MigrationChannel], *, exit_on_error: bool, fds: FdLookup
    ) -> None:
        """Open the listener and load the guest as a task.

        Raises:
            QMPError: The state forbids it.
            ChannelError: The address cannot be bound or opened.
        """
        self.check_may_start()
        address = channels[0].address
        check_transport(address, self._options.capabilities, self._options.parameters)
        if self.migration is not None and self.migration.status != "failed":
            raise QMPError(f"Illegal migration incoming state: {self.migration.status}")
        self._options.check_built()
        migration = self.migration = self._make()
        migration.begin()
        # As in QEMU: where this fails, the status stays ``setup`` and the process is spent.
        migration.listen_on(self._tls.incoming(await listen(address, fds)))
        self._is_started = True
        self._options.is_listening = True
        self._spawn(self._load(migration, exit_on_error=exit_on_error))

    def _make(self) -> IncomingMigration:
        cpr = None
        berth: Berth = self._shelter.berth()
        if self._cpr is not None:
            berth = cpr_berth = self._shelter.cpr_berth()
            cpr = CprArrival(self._cpr, cpr_berth)
        replica = self._shelter.replica_berth() if self._options.capabilities["x-colo"] else None
        return IncomingMigration(
            replica or berth,
            partial(self._settings, is_replica=replica is not None),
            self._events.status,
            partial(self._arrived, replica),
            cpr,
            self._run.runs_lazily,
            partial(self._events.colo_exit, "secondary"),
        )

    def _settings(self, *, is_replica: bool) -> IncomingSettings:
        settings = incoming_settings(
            self._options, self._config.uuid, ram_limit_bytes=self._config.ram_limit_bytes
        )
        if is_replica and not settings.colo:
            raise QMPError("Capability 'x-colo' was on when the listener was opened")
        return settings

    async def _arrived(self, replica: ReplicaBerth | None, guest: HeldGuest) -> None:
        if replica is not None:
            guest = await asyncio.to_thread(replica.take_over, guest)
        await self._run.arrived(guest)

    async def _load(self, migration: IncomingMigration, *, exit_on_error: bool) -> None:
        try:
            guest = await migration.run()
        finally:
            self._options.is_listening = False
        if guest is not None:
            return
        if exit_on_error and migration.error is not None:
            self._on_fatal()
        else:
            # Differs from QEMU: a bad source costs its own migration, the next may come.
            self._is_started = False
            self.make_memory_ready()

    def make_memory_ready(self) -> None:
        """Touch the memory of ``-ram-prealloc`` while nobody waits for it."""
        self._spawn(asyncio.to_thread(self._shelter.make_ready))

    async def open_cpr(self, address: Address) -> None:
        """Listen for the memory that comes before the stream of every incoming migration.

        Raises:
            ChannelError: The address cannot be bound.
        """
        self._cpr = await listen_cpr(address)

    def check_recovery_may_start(self) -> None:
        """Only a postcopy that is paused can be recovered.

        Raises:
            QMPError: None is.
        """
        self._paused()

    async def recover(self, address: Address, *, fds: FdLookup) -> None:
        """Let the source of a paused postcopy in again.

        Raises:
            QMPError: None is paused here.
            ChannelError: The address cannot be bound or opened.
        """
        migration = self._paused()
        listener = self._tls.incoming(await listen(address, fds))
        if migration.status != "postcopy-paused":
            listener.close()
        self._paused().recover_on(listener)

    def lose(self, guest: HeldGuest) -> bool:
        """A workload is gone.

        Returns:
            Whether a guest was being loaded into it, which fails now.
        """
        migration = self.migration
        if migration is None or not migration.has_begun(guest):
            return False
        migration.guest_gone()
        return True

    def _paused(self) -> IncomingMigration:
        if self.migration is None or self.migration.status != "postcopy-paused":
            raise QMPError("Migrate recover can only be run when postcopy is paused.")
        return self.migration

    def close(self) -> None:
        """Listen for no memory any more."""
        if self._cpr is not None:
            self._cpr.close()

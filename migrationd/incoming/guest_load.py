"""What the loading thread does: the records of a stream in their order, until a guest is whole.

Pages and sections are the loader's; what comes here says something about the guest or
wants an answer. The driver says when there is a connection and what a loss means.

Reference: stream format 1.5, 4 and 6.1-6.4.
"""

import logging
from collections.abc import Callable

from migrationd.codec.constants import (
    MIG_CMD_ENABLE_COLO,
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PACKAGED,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_POSTCOPY_LISTEN,
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    MIG_CMD_POSTCOPY_RESUME,
    MIG_CMD_POSTCOPY_RUN,
    MIG_CMD_RECV_BITMAP,
    MIG_CMD_SWITCHOVER_START,
)
from migrationd.codec.records import Command, Configuration, Package, RamBlockList
from migrationd.codec.return_path import Pong, Shut, SwitchoverAck
from migrationd.errors import ChannelError, StreamCorrupt, StreamUnsupported
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.held import HeldGuest
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock
from migrationd.guest.workload_devices import DECLARATIONS
from migrationd.incoming.arrival import (
    check_configuration,
    check_uuid,
    complete,
    identity_of,
    specs_of,
)
from migrationd.incoming.berth import Berth, IncomingSettings
from migrationd.incoming.lazy_run import LazyRun
from migrationd.incoming.loader import Barrier, Pause, StreamLoader
from migrationd.incoming.mapped_ram import load_mapped_ram
from migrationd.incoming.multifd_receive import MultifdReceiver
from migrationd.incoming.postcopy import PostcopyArrival
from migrationd.incoming.return_path import ReturnPath
from migrationd.migration.dialect import dialect_of
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

_POSTCOPY_COMMANDS = frozenset(
    (
        MIG_CMD_POSTCOPY_ADVISE,
        MIG_CMD_POSTCOPY_LISTEN,
        MIG_CMD_POSTCOPY_RAM_DISCARD,
        MIG_CMD_POSTCOPY_RESUME,
        MIG_CMD_POSTCOPY_RUN,
        MIG_CMD_RECV_BITMAP,
    )
)


class GuestLoad:
    """Loads one guest; runs on the loading thread, except for :meth:`let_go`.

    Args:
        settings: Of this migration.
        berth: Where the guest goes.
        loader: Of the stream.
        return_path: To the source.
        postcopy: What the commands of postcopy do.
        multifd: Channels that carry pages besides the stream.
        source_uuid: What the hellos of multifd said, 16 bytes.
        lazy_run: For a guest that runs before its memory is there.

    Attributes:
        loader: As given.
        postcopy: As given.
        guest: None before its memory is made, and when it was given up.
        lazy: Of a guest that runs before its memory is there.
    """

    def __init__(
        self,
        *,
        settings: IncomingSettings,
        berth: Berth,
        loader: StreamLoader,
        return_path: ReturnPath,
        postcopy: PostcopyArrival,
        multifd: MultifdReceiver | None,
        source_uuid: bytes | None,
        lazy_run: Callable[[AttachedGuest], LazyRun],
    ) -> None:
        self._settings = settings
        self._berth = berth
        self._return_path = return_path
        self._multifd = multifd
        self._source_uuid = source_uuid
        self._lazy_run = lazy_run
        self.loader = loader
        self.postcopy = postcopy
        self.guest: HeldGuest | None = None
        self.lazy: LazyRun | None = None

    def go_on(self) -> Pause:
        """Load until there is a reason to look up.

        Raises:
            MigrationdError: The guest cannot be loaded.
        """
        while not isinstance(result := self.loader.step(), Pause):
            self._take(result)
        return result

    def finish(self) -> HeldGuest:
        """Behind the end of the stream: the guest is safe here; the source may forget it.

        Raises:
            MigrationdError: It is not whole, or cannot be kept.
        """
        guest = self.guest
        if guest is None:
            raise StreamCorrupt("the stream has no RAM section", position=self.loader.position)
        if self.lazy is not None:
            self.lazy.finish()
        complete(guest, self.loader.arrival, by_postcopy=self.postcopy.owns_guest)
        if self._settings.colo and (not isinstance(guest, ParkedGuest) or guest.file is not None):
            raise StreamUnsupported(
                "a replica is held in memory",
                hint="turn x-colo on before the listener is opened, and start without -guest",
            )
        self._settle(guest)
        return guest

    def load_file(self, channel: Channel) -> HeldGuest:
        """Load a mapped-ram file, which has everything at its place.

        Raises:
            MigrationdError: The guest cannot be loaded.
        """
        self.guest = load_mapped_ram(
            channel,
            self._berth.adopt,
            ram_limit_bytes=self._settings.ram_limit_bytes,
            mapping=self._settings.bitmap_mapping,
            check=lambda record: check_uuid(record, self._settings.guest_uuid, 0),
        )
        self._settle(self.guest)
        return self.guest

    def let_go(self) -> tuple[HeldGuest | None, LazyRun | None]:
        """What there is of a guest that is given up; the caller ends it."""
        guest, self.guest = self.guest, None
        lazy, self.lazy = self.lazy, None
        return guest, lazy

    def _take(self, record: Barrier) -> None:
        match record:
            case Configuration():
                check_configuration(
                    record,
                    self._settings.guest_uuid,
                    self.loader.position,
                    ignores_shared=self._settings.ignores_shared,
                )
                self.loader.arrival.configuration = record
            case RamBlockList():
                self.loader.use_blocks(self._allocate(record))
            case Command():
                self._obey(record)
            case Package():
                self.postcopy.unpack(record, self.loader)

    def _allocate(self, blocks: RamBlockList) -> tuple[RamBlock, ...]:
        arrival = self.loader.arrival
        identity = identity_of(arrival, self._source_uuid)
        specs = specs_of(blocks, self.loader.page_size)
        guest = self.guest = self._berth.allocate(identity, tuple(arrival.devices), specs)
        is_workload = any(device.idstr == DECLARATIONS for device in arrival.devices)
        if is_workload and self._settings.switchover_ack and self._return_path.is_open:
            # Who takes it has accepted the declarations, and has the memory.
            self._return_path.answer(SwitchoverAck())
        self.postcopy.prepare(guest.ram)
        if self._settings.ignores_shared:
            for block in guest.ram:
                block.track_received()
        if self.postcopy.has_ram and isinstance(guest, AttachedGuest):
            guest.check_page_sizes(specs)
            self._expect_lazy(guest)
        if self._multifd is not None:
            self._multifd.start(guest.ram, self.loader.page_size)
        return guest.ram

    def _expect_lazy(self, guest: AttachedGuest) -> None:
        """Make ready for a guest that runs before its memory is there."""
        LazyRun.prepare(guest)
        lazy = self.lazy = self._lazy_run(guest)
        self.postcopy.launch = lambda pings: lazy.launch(self.loader.arrival.devices, pings)

    def _obey(self, command: Command) -> None:
        position = self.loader.position
        match command.number:
            case n if n == MIG_CMD_OPEN_RETURN_PATH:
                self._return_path.open(position)
                configuration = self.loader.arrival.configuration
                dialect = dialect_of(configuration.machine if configuration else None)
                if self._settings.switchover_ack and dialect.switchover_ack_at_once:
                    self._return_path.answer(SwitchoverAck())
            case n if n == MIG_CMD_PING:
                if not self._return_path.is_open:
                    raise StreamCorrupt("PING without a return path", position=position)
                self._return_path.answer(Pong(int.from_bytes(command.payload, "big")))
            case n if n == MIG_CMD_SWITCHOVER_START:
                self.loader.arrival.has_switchover_start = True
            case n if n in _POSTCOPY_COMMANDS:
                # Dirty bitmaps can do without a way back.
                is_for_bitmaps = n == MIG_CMD_POSTCOPY_ADVISE and not command.payload
                if not self._return_path.is_open and not is_for_bitmaps:
                    raise StreamCorrupt("postcopy without a return path", position=position)
                self.postcopy.obey(command, self.loader)
            case n if n == MIG_CMD_ENABLE_COLO and self._settings.colo:
                pass  # 11.1 does not even say it
            case n if n == MIG_CMD_PACKAGED:
                pass  # what it holds comes next
            case _:
                raise StreamUnsupported(
                    f"command {command.number} is not taken",
                    position=position,
                    hint="the capability x-colo is off here",
                )

    def _settle(self, guest: HeldGuest) -> None:
        self._berth.settle(guest)
        if not self._return_path.is_open:
            return
        try:
            self._return_path.answer(Shut(0))
        except ChannelError as error:
            if self.postcopy.owns_guest:
                log.warning("the source left before it heard that the guest is whole: %s", error)
                return
            # The guest is whole, as it would be at a QEMU that already runs it: keep it.
            log.warning(
                "the source left before it heard that the guest arrived (%s): "
                "it may have resumed the guest; do not run both",
                error,
            )

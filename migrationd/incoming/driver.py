"""The destination side: listen, load, acknowledge. The only place with this order.

    setup      a listener is open (or a file, pipe or descriptor)
    active     the first bytes of the stream were read
    completed  the guest is held (durably, if it rests in a file), then SHUT 0 is sent
    failed     anything else; SHUT 1 is sent if the return path is open

Reference: QEMU's destination; sequences in stream format 6.1-6.3.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, TypeVarTuple

from migrationd.codec.constants import (
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_SWITCHOVER_START,
)
from migrationd.codec.records import Command, Configuration, RamBlockList
from migrationd.codec.return_path import Pong, Shut, SwitchoverAck, encode_return_path
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import (
    ChannelError,
    MigrationdError,
    MigrationError,
    StreamCorrupt,
    StreamUnsupported,
)
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.channels import IncomingChannels
from migrationd.incoming.loader import Arrival, Barrier, Pause, StreamLoader
from migrationd.incoming.mapped_ram import load_mapped_ram
from migrationd.migration.dialect import dialect_of
from migrationd.migration.info import MigrationInfo
from migrationd.migration.status import Cause, Role, StatusMachine
from migrationd.store.mapped_ram_reader import Contents
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Berth(Protocol):
    """Where an arriving guest gets its memory, and is made durable."""

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        blocks: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """Make a guest of these blocks; called on the loading thread.

        Args:
            identity: From the configuration.
            early: Device sections that came before RAM.
            blocks: The block list.

        Raises:
            GuestError: There is not enough memory.
            StoreError: The file cannot be made.
        """

    def adopt(self, fd: int, contents: Contents) -> ParkedGuest:
        """Take the guest of a mapped-ram file; called on the loading thread.

        Args:
            fd: File, open for reading; stays the caller's.
            contents: What it holds.

        Raises:
            GuestError: It cannot be mapped.
            StoreError: The file does not hold what it says, or no other can be made.
        """

    def settle(self, guest: ParkedGuest) -> None:
        """Make the complete guest durable; called on the loading thread.

        Raises:
            StoreError: The guest is not on stable storage.
        """

    def abandon(self) -> None:
        """Throw away what :meth:`allocate` made; called after a failure."""


@dataclass(frozen=True, slots=True)
class IncomingSettings:
    """What the monitor and the command line chose for this migration."""

    ram_limit_bytes: int | None = None
    switchover_ack: bool = False
    validate_uuid: bool = False
    guest_uuid: bytes | None = None
    mapped_ram: bool = False


class IncomingMigration:
    """One incoming migration, from its listener to a held guest.

    Runs on the event loop; loading steps run in an executor thread of its own.

    Args:
        listener: Open listener; closed here.
        berth: Where the guest goes.
        settings: Read when the stream begins, so that capabilities may be set while listening.
        on_status: Called with each new status.
    """

    def __init__(
        self,
        berth: Berth,
        settings: Callable[[], IncomingSettings],
        on_status: Callable[[str], None],
    ) -> None:
        self._berth = berth
        self._settings_now = settings
        self._settings = IncomingSettings()
        self._status = StatusMachine(Role.INCOMING, on_status)
        self._error: MigrationdError | None = None
        self._listener: Listener | None = None
        self._channels: IncomingChannels | None = None
        self._channel: Channel | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="incoming")
        self._return_path_open = False
        self._guest: ParkedGuest | None = None

    @property
    def status(self) -> str:
        """Incoming MigrationStatus."""
        return self._status.status

    @property
    def error(self) -> MigrationdError | None:
        """Why it failed."""
        return self._error

    def info(self) -> MigrationInfo | None:
        """The destination's part of ``query-migrate``; None before anything happened."""
        if self.status == "none":
            return None
        addresses: tuple[dict[str, object], ...] = ()
        if self._listener is not None and self.status in ("setup", "active"):
            addresses = tuple(self._listener.qapi_addresses())
        return MigrationInfo(
            status=self.status,
            error_desc=None if self._error is None else f"load of migration failed: {self._error}",
            socket_address=addresses,
        )

    def begin(self) -> None:
        """Enter ``setup``.

        Raises:
            InvalidState: An earlier incoming migration was begun here.
        """
        self._status.advance(Cause.START)

    def listen_on(self, listener: Listener) -> None:
        """Say where the source will come from; the listener is closed by :meth:`run`."""
        self._listener = listener

    async def run(self) -> ParkedGuest | None:
        """Accept the source and load its guest.

        Returns:
            The held guest, or None after a failure (see :attr:`error`).
        """
        listener = self._listener
        assert listener is not None
        self._channels = channels = IncomingChannels(listener)
        try:
            main = await self._connect(channels)
            guest = await self._load(main)
            await self._acknowledge(main, guest)
            self._status.advance(Cause.COMPLETE)
            return guest
        except MigrationdError as error:
            await self._fail(error)
            return None
        except asyncio.CancelledError:
            await self._abandon()
            raise
        except Exception as error:  # a defect of ours must end as a failed migration
            log.error("internal error in the incoming migration", exc_info=error)
            await self._fail(MigrationError(f"internal error: {error!r}"))
            return None
        finally:
            channels.shutdown()
            self._executor.shutdown(wait=True)
            channels.close()

    async def _connect(self, channels: IncomingChannels) -> Channel:
        """Phase 1: every connection that the source makes before it sends pages."""
        await channels.accept_first()
        self._settings = self._settings_now()
        self._channel = await channels.gather()
        return self._channel

    async def _load(self, channel: Channel) -> ParkedGuest:
        """Phase 2: the stream, until the guest is whole."""
        if self._settings.mapped_ram:
            self._stream_began()
            self._guest = await self._on_thread(self._load_file, channel)
            return self._guest
        loop = asyncio.get_running_loop()
        decoder = StreamDecoder(StreamLimits(ram_bytes=self._settings.ram_limit_bytes))
        loader = StreamLoader(
            channel, decoder, lambda: loop.call_soon_threadsafe(self._stream_began)
        )
        while True:
            result = await self._on_thread(loader.step)
            if isinstance(result, Pause):
                if result is Pause.FINISHED:
                    break
                continue
            await self._on_thread(self._pass_barrier, loader, result)
        return self._complete(loader)

    async def _on_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a step on the loading thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    def _load_file(self, channel: Channel) -> ParkedGuest:
        return load_mapped_ram(
            channel,
            self._berth.adopt,
            ram_limit_bytes=self._settings.ram_limit_bytes,
            check=lambda configuration: self._check_uuid(configuration, 0),
        )

    def _stream_began(self) -> None:
        if self._status.can(Cause.STREAM):
            self._status.advance(Cause.STREAM)

    def _pass_barrier(self, loader: StreamLoader, record: Barrier) -> None:
        """Handle a record in order; runs on the loading thread."""
        match record:
            case Configuration():
                self._check_configuration(record, loader.position)
                loader.arrival.configuration = record
            case RamBlockList():
                loader.use_blocks(self._allocate(loader, record))
            case Command():
                self._obey(record, loader)

    def _check_configuration(self, configuration: Configuration, position: int) -> None:
        for name in configuration.capabilities or ():
            raise StreamUnsupported(
                f"Capability {name} is off, but received capability is on",
                position=position,
                section="configuration",
            )
        self._check_uuid(configuration, position)

    def _check_uuid(self, configuration: Configuration, position: int) -> None:
        own = self._settings.guest_uuid
        if configuration.uuid is not None and own is not None and configuration.uuid != own:
            raise StreamCorrupt(
                f"the source's UUID {configuration.uuid.hex()} is not this guest's {own.hex()}",
                position=position,
                section="configuration/uuid",
                hint="start the daemon with the source's -uuid",
            )

    def _allocate(self, loader: StreamLoader, blocks: RamBlockList) -> tuple[RamBlock, ...]:
        specs = tuple(
            RamBlockSpec(
                idstr=entry.idstr,
                used_length=entry.used_length,
                page_size=loader.page_size,
                address=entry.address,
            )
            for entry in blocks.blocks
        )
        arrival = loader.arrival
        self._guest = self._berth.allocate(_identity(arrival), tuple(arrival.devices), specs)
        return self._guest.ram

    def _obey(self, command: Command, loader: StreamLoader) -> None:
        channel = self._channel
        assert channel is not None
        match command.number:
            case n if n == MIG_CMD_OPEN_RETURN_PATH:
                if not channel.is_duplex:
                    raise StreamUnsupported(
                        "the source opens a return path, but this transport has none",
                        position=loader.position,
                        hint="turn the source's return-path capability off",
                    )
                self._return_path_open = True
                configuration = loader.arrival.configuration
                dialect = dialect_of(configuration.machine if configuration else None)
                if self._settings.switchover_ack and dialect.switchover_ack_at_once:
                    channel.send(encode_return_path(SwitchoverAck()))
            case n if n == MIG_CMD_PING:
                if not self._return_path_open:
                    raise StreamCorrupt("PING without a return path", position=loader.position)
                channel.send(encode_return_path(Pong(int.from_bytes(command.payload, "big"))))
            case n if n == MIG_CMD_SWITCHOVER_START:
                loader.arrival.has_switchover_start = True
            case n if n == MIG_CMD_POSTCOPY_ADVISE:
                # Without payload it announces dirty bitmaps only. With one the source may turn
                # to postcopy at any time: refused while its guest still runs there.
                if command.payload:
                    raise StreamUnsupported(
                        "RAM postcopy is not taken",
                        position=loader.position,
                        hint="turn the source's postcopy-ram capability off",
                    )
            case _:
                raise StreamUnsupported(
                    f"command {command.number} is not taken",
                    position=loader.position,
                    hint="turn postcopy and COLO off at the source",
                )

    def _complete(self, loader: StreamLoader) -> ParkedGuest:
        arrival = loader.arrival
        if self._guest is None:
            raise StreamCorrupt("the stream has no RAM section", position=loader.position)
        self._guest.complete(
            arrival.devices,
            arrival.vmdescription,
            SeenOnArrival(
                configuration=arrival.configuration is not None,
                section_footers=arrival.has_footers,
                vmdescription=arrival.vmdescription is not None,
                switchover_start=arrival.has_switchover_start,
            ),
        )
        return self._guest

    async def _acknowledge(self, channel: Channel, guest: ParkedGuest) -> None:
        """Phase 3: the guest is safe here; the source may forget it."""
        await self._on_thread(self._berth.settle, guest)
        if not self._return_path_open:
            return
        try:
            await self._on_thread(channel.send, encode_return_path(Shut(0)))
        except ChannelError as error:
            # The guest is whole, as it would be at a QEMU that already runs it: keep it.
            log.warning(
                "the source left before it heard that the guest arrived (%s): "
                "it may have resumed the guest; do not run both",
                error,
            )

    async def _fail(self, error: MigrationdError) -> None:
        self._error = error
        log.error("load of migration failed: %s", error)
        channel = self._channel
        if self._return_path_open and channel is not None:
            try:
                await asyncio.wait_for(
                    self._on_thread(channel.send, encode_return_path(Shut(1))), 1.0
                )
            except (ChannelError, TimeoutError) as failure:
                log.debug("SHUT 1 was not sent: %s", failure)
        await self._abandon()
        self._status.advance(Cause.FAIL)

    async def _abandon(self) -> None:
        if self._channels is not None:
            self._channels.shutdown()
        guest, self._guest = self._guest, None
        await asyncio.shield(self._on_thread(self._berth.abandon))
        if guest is not None:
            guest.close()


def _identity(arrival: Arrival) -> GuestIdentity:
    configuration = arrival.configuration
    if configuration is None:
        return GuestIdentity()
    return GuestIdentity(
        machine=configuration.machine,
        target_page_bits=configuration.target_page_bits,
        capabilities=configuration.capabilities,
        uuid=configuration.uuid,
    )

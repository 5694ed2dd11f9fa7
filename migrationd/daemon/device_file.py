"""The devices of a guest in a file of their own, without its memory.

    FileHeader, then a FULL section for each device, then the end of the stream

Reference: ``xen-save-devices-state`` and ``xen-load-devices-state`` of QEMU 11.1.
"""

import asyncio
import os
import stat
from collections.abc import Callable, Sequence

from migrationd.codec.constants import QEMU_VM_FILE_VERSION, QEMU_VM_SECTION_FULL
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.records import EndOfStream, FileHeader, OpaqueSection
from migrationd.codec.stream import StreamDecoder
from migrationd.daemon.shelter import Shelter
from migrationd.errors import QMPError, StreamUnsupported
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import Guest, held_still
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import Owner
from migrationd.migration.dialect import Dialect, dialect_of
from migrationd.outgoing.device_save import encode_device
from migrationd.qmp.event_bus import EventBus
from migrationd.transport.address import FileAddress
from migrationd.transport.channel import Channel
from migrationd.transport.connect import open_now

FILE_LIMIT_BYTES = 256 << 20
"""Largest file that is read."""


class DeviceFiles:
    """Writes and reads such files; lives on the event loop.

    Args:
        bus: Where events go.
        shelter: Keeps the guest from leaving meanwhile.
        guest: Gives the guest, or None if there is none.
        is_migrating: Whether a migration has the guest's devices in its hands.
    """

    def __init__(
        self,
        bus: EventBus,
        shelter: Shelter,
        guest: Callable[[], ParkedGuest | AttachedGuest | None],
        is_migrating: Callable[[], bool],
    ) -> None:
        self._bus = bus
        self._shelter = shelter
        self._guest = guest
        self._is_migrating = is_migrating

    async def save(self, path: str) -> None:
        """Write the state of the devices; a guest that runs stands still meanwhile.

        Raises:
            QMPError: There is no guest, or a migration has it.
            ConnectFailed: The file cannot be made.
            ChannelError: It cannot be written.
            GuestError: A workload does not stop, or a device cannot be saved.
        """
        guest = self._held()
        keep = guest.file.identity if guest.file is not None else None
        with self._shelter.occupied("The guest's devices are being saved"):
            await self._save(guest, open_now(FileAddress(path, 0), _no_fds, keep=keep))

    async def _save(self, guest: ParkedGuest | AttachedGuest, channel: Channel) -> None:
        loop = asyncio.get_running_loop()

        def tell(event: str) -> None:
            loop.call_soon_threadsafe(self._bus.emit, event, None)

        def save() -> None:
            if guest.live is None:
                _write_devices(guest, channel)
                return
            still = held_still(guest.live, lambda: tell("STOP"), lambda: tell("RESUME"))
            with still as was_running:
                guest.live.save_devices(was_running=was_running)
                _write_devices(guest, channel)

        try:
            await asyncio.to_thread(save)
        finally:
            channel.close()

    async def load(self, path: str) -> None:
        """Take the devices up that a file holds.

        Raises:
            QMPError: The guest runs, or it is none whose devices could be loaded.
            StreamError: The file is none of these.
            GuestError: The workload cannot load them; it names device and field.
        """
        live = self._held().live
        if live is not None and live.is_running:
            raise QMPError("Cannot update device state while vm is running")
        data = await asyncio.to_thread(_read, path)
        if live is None:
            raise QMPError("the devices of a parked guest are kept as they came")
        devices = decode_devices(data)
        if self._is_migrating():
            raise QMPError("Cannot update device state while vm is running")
        await asyncio.to_thread(_load_devices, live, devices)

    def _held(self) -> ParkedGuest | AttachedGuest:
        guest = self._guest()
        if guest is None or guest.owner is not Owner.HELD:
            raise QMPError("There is no guest whose devices could be saved or loaded")
        if self._is_migrating():
            raise QMPError("There's a migration process in progress")
        return guest


def _write_devices(guest: ParkedGuest | AttachedGuest, channel: Channel) -> None:
    dialect = dialect_of(guest.identity.machine, guest.seen)
    channel.send(encode_devices(guest, dialect))


def _load_devices(guest: AttachedGuest, devices: Sequence[DeviceState]) -> None:
    with guest.run_state_held():
        if guest.is_running:
            raise QMPError("Cannot update device state while vm is running")
        guest.complete(devices, None, guest.seen)


def encode_devices(guest: Guest, dialect: Dialect) -> bytes:
    """The file of a guest's devices."""
    encode = StreamEncoder().encode
    devices = [item for item in guest.devices if item.kind == QEMU_VM_SECTION_FULL]
    return b"".join(
        (
            encode(FileHeader(QEMU_VM_FILE_VERSION)),
            *(encode_device(item, dialect) for item in devices if not item.is_early),
            encode(EndOfStream()),
        )
    )


def decode_devices(data: bytes) -> list[DeviceState]:
    """The devices of a file.

    Raises:
        StreamError: It is none, or holds more than devices.
    """
    decoder = StreamDecoder()
    decoder.feed(data)
    decoder.feed_eof()
    devices = []
    while (record := decoder.next_record()) is not None:
        if isinstance(record, OpaqueSection) and record.kind == QEMU_VM_SECTION_FULL:
            devices.append(DeviceState.of_section(record, in_setup=False))
        elif not isinstance(record, FileHeader | EndOfStream):
            raise StreamUnsupported(
                "there is more than devices in the file",
                position=decoder.position,
                hint="take it with migrate-incoming",
            )
    return devices


def _read(path: str) -> bytes:
    try:
        # Non-blocking: a FIFO without a writer must not hold the guest.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_LIMIT_BYTES:
                raise QMPError(f"'{path}' is no file of devices")
            return file.read(FILE_LIMIT_BYTES)
    except OSError as error:
        raise QMPError(f"Could not open '{path}': {error.strerror}") from error


def _no_fds(name: str) -> int:
    raise QMPError(f"File descriptor named '{name}' has not been found")

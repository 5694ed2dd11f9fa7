"""The guest of a migration file, whatever the file's form: its pages can be read.

A mapped-ram file is mapped where it is. A stream is loaded: into memory if it is small
enough, else into a file without a name.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from migrationd.codec.constants import (
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_SWITCHOVER_START,
)
from migrationd.codec.records import Command, Configuration, RamBlockList
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import StoreError, StreamUnsupported
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import AnonymousMemory, FileMemory, Memory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.run_state import PAUSED, RUNNING
from migrationd.incoming.loader import Arrival, Pause, StreamLoader
from migrationd.incoming.mapped_ram import map_guest
from migrationd.linux.meminfo import available_bytes
from migrationd.store.compressed import PlainStream
from migrationd.store.container import Container, opened
from migrationd.store.mapped_ram_reader import RAM_LIMIT_BYTES, read_contents
from migrationd.transport.channel import Channel

Allocate = Callable[[GuestIdentity, Sequence[DeviceState], Sequence[RamBlockSpec]], ParkedGuest]
"""Identity, device sections before RAM, block list -> a guest of empty blocks."""

_HARMLESS = (MIG_CMD_OPEN_RETURN_PATH, MIG_CMD_PING, MIG_CMD_POSTCOPY_ADVISE)
"""Commands of a stream that was recorded on its way: nobody is there to answer."""


class FileGuest(contextlib.AbstractContextManager["FileGuest"]):
    """An open file and its guest.

    Args:
        path: The file.
        position: Where its stream begins.
        allocate: Where a loaded guest's memory comes from; by default memory or a file
            without a name.

    Attributes:
        container: The file's form.
        guest: The guest; complete.

    Raises:
        StoreError: It is no complete migration file.
        StreamError: Its stream is damaged.
        GuestError: There is no room for it.
    """

    def __init__(self, path: Path, *, position: int = 0, allocate: Allocate | None = None) -> None:
        with opened(path, position=position) as (fd, container):
            self.container: Container = container
            if self.container.is_mapped_ram:
                contents = read_contents(fd, str(path), position=self.container.position)
                self.guest = map_guest(fd, contents)
            else:
                with PlainStream(fd, self.container, str(path)) as stream:
                    self.guest = load_stream(stream.channel, allocate or allocate_anywhere)
            if self.container.libvirt is not None:
                # libvirt stops a guest before it saves it, and notes apart whether it ran.
                was_running = self.container.libvirt.was_running
                self.guest.choose_run_state(RUNNING if was_running else PAUSED)

    def __exit__(self, *_: object) -> None:
        self.guest.close()


def load_stream(channel: Channel, allocate: Allocate) -> ParkedGuest:
    """Load a whole stream.

    Args:
        channel: Where it comes from.
        allocate: Where its memory comes from.

    Raises:
        StreamError: It is damaged, or not all of the guest is in it.
        StoreError: It has no RAM section.
        GuestError: There is no room for it.
    """
    loader = StreamLoader(
        channel, StreamDecoder(StreamLimits(ram_bytes=RAM_LIMIT_BYTES)), lambda: None
    )
    arrival = loader.arrival
    guest: ParkedGuest | None = None
    try:
        while True:
            match loader.step():
                case Pause.FINISHED:
                    break
                case Configuration() as configuration:
                    arrival.configuration = configuration
                case RamBlockList(_, entries):
                    specs = [
                        RamBlockSpec(
                            entry.idstr, entry.used_length, loader.page_size, entry.address
                        )
                        for entry in entries
                    ]
                    guest = allocate(_identity(arrival), tuple(arrival.devices), specs)
                    loader.use_blocks(guest.ram)
                case Command(number) if number == MIG_CMD_SWITCHOVER_START:
                    arrival.has_switchover_start = True
                case Command(number) if number not in _HARMLESS:
                    raise StreamUnsupported(
                        f"command {number}", position=loader.position, hint="no precopy stream"
                    )
        if guest is None:
            raise StoreError("the stream has no RAM section")
        guest.complete(
            arrival.devices,
            arrival.vmdescription,
            SeenOnArrival(
                configuration=arrival.configuration is not None,
                section_footers=arrival.has_footers,
                vmdescription=arrival.vmdescription is not None,
                switchover_start=arrival.has_switchover_start,
            ),
        )
    except BaseException:
        if guest is not None:
            guest.close()
        raise
    return guest


def allocate_anywhere(
    identity: GuestIdentity, early: Sequence[DeviceState], specs: Sequence[RamBlockSpec]
) -> ParkedGuest:
    """Memory for small guests; for others a file without a name, where temporary files go.

    Raises:
        GuestError: There is no room.
        StoreError: There is no file.
    """
    if sum(spec.used_length for spec in specs) <= available_bytes() // 2:
        return ParkedGuest.create(
            identity, specs, lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size)
        )
    ends = [0]
    for spec in specs:
        ends.append(ends[-1] + -(-spec.used_length // 4096) * 4096)
    folder = tempfile.gettempdir()
    try:
        with open(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "rb") as file:
            fd = file.fileno()
            os.ftruncate(fd, ends[-1])
            kept = _KeptFd(fd)
    except OSError as error:
        raise StoreError(f"'{folder}' cannot hold the guest: {error.strerror}") from error

    def allocate(index: int, spec: RamBlockSpec) -> Memory:
        return _KeptFileMemory(kept, ends[index], spec)

    return ParkedGuest.create(identity, specs, allocate)


class _KeptFd:
    """A descriptor that is closed when nobody needs it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        os.close(self.fd)


class _KeptFileMemory(FileMemory):
    """File memory whose file lives as long as it does."""

    def __init__(self, kept: _KeptFd, position: int, spec: RamBlockSpec) -> None:
        super().__init__(kept.fd, position, spec.used_length, spec.page_size)
        self._kept = kept


def _identity(arrival: Arrival) -> GuestIdentity:
    configuration = arrival.configuration
    if configuration is None:
        return GuestIdentity()
    return GuestIdentity(
        configuration.machine,
        configuration.target_page_bits,
        configuration.capabilities,
        configuration.uuid,
    )

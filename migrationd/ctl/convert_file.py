"""``migrationctl convert``: a guest from one form of migration file into another."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from migrationd.clock import SystemClock
from migrationd.ctl.file_guest import FileGuest
from migrationd.ctl.new_file import new_file
from migrationd.errors import ChannelError, MigrationdError, StoreError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import FileMemory, Memory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.run_state import RUNNING
from migrationd.migration.dialect import dialect_of
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.device_save import free_section_id, stream_head, stream_tail
from migrationd.outgoing.mapped_ram_save import MappedRamSaver, guest_layout
from migrationd.outgoing.ram_save import RamSaver
from migrationd.store.compressed import Compressor
from migrationd.store.container import open_file
from migrationd.store.libvirt_image import (
    LibvirtImage,
    encode_libvirt_image,
    is_libvirt_image,
    read_libvirt_image,
)
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

FORMS = ("plain", "mapped-ram", "zstd", "libvirt")
ZSTD_LEVELS = range(-7, 23)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is wanted.

    Attributes:
        form: One of ``FORMS``.
        level: Of zstd.
        position: Where the source's stream begins.
        domain: For libvirt's form: domain XML, or a save image to take it from; not needed
            where the source is a save image itself.
        overwrite: Replace a file that is there.
    """

    form: str
    level: int = 3
    position: int = 0
    domain: Path | None = None
    overwrite: bool = False


def convert(source: Path, target: Path, wanted: Conversion) -> int:
    """Convert; the target is there whole, and on stable storage, or not at all.

    Returns:
        Bytes of the target.

    Raises:
        MigrationdError: The source is no migration file, or the target cannot be written.
    """
    with new_file(target, overwrite=wanted.overwrite) as fd:
        try:
            _convert(source, target, fd, wanted)
        except MigrationdError as error:
            if _is_full(error.__cause__) and f"'{target}'" not in str(error):
                raise StoreError(f"'{target}': {error}") from error
            raise
        return os.fstat(fd).st_size


def _convert(source: Path, target: Path, fd: int, wanted: Conversion) -> None:
    places = _Places(fd) if wanted.form == "mapped-ram" else None
    allocate = places.allocate if places is not None else None
    with FileGuest(source, position=wanted.position, allocate=allocate) as file:
        guest = file.guest
        if places is not None:
            _write_mapped_ram(guest, fd, str(target), is_in_place=places.are_used)
        elif wanted.form == "zstd":
            _write_zstd(guest, fd, wanted.level)
        elif wanted.form == "libvirt":
            _write_libvirt(guest, fd, _domain(file.container.libvirt, wanted), str(target))
        else:
            _write_plain(guest, fd)
        guest.check_unchanged()


def _is_full(cause: BaseException | None) -> bool:
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Places:
    """A stream's pages go straight to their places in the mapped-ram file that is written.

    Args:
        fd: The file; it stays the caller's.

    Attributes:
        are_used: Whether they did: those of a mapped-ram file are where they are.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.are_used = False

    def allocate(
        self,
        identity: GuestIdentity,
        early: Sequence[DeviceState],
        specs: Sequence[RamBlockSpec],
    ) -> ParkedGuest:
        """A guest whose blocks are the file's; as for :class:`FileGuest`."""
        page_size = specs[0].page_size if specs else 4096
        layout = guest_layout(identity, early, specs, page_size, uuid=identity.uuid)
        os.ftruncate(self._fd, layout.tail_position)
        self.are_used = True

        def allocate(index: int, spec: RamBlockSpec) -> Memory:
            position = layout.blocks[index].pages_position
            return FileMemory(self._fd, position, spec.used_length, spec.page_size)

        return ParkedGuest.create(identity, specs, allocate)


def _write_mapped_ram(guest: ParkedGuest, fd: int, path: str, *, is_in_place: bool) -> None:
    saver = MappedRamSaver(
        fd,
        guest,
        dialect_of(guest.identity.machine, guest.seen),
        uuid=guest.identity.uuid,
        writers=2,
    )
    saver.begin()
    if is_in_place:
        saver.keep_pages()
    else:
        saver.save_pages()
    saver.finish()
    saver.read_back(path)


def _write_plain(guest: ParkedGuest, fd: int) -> None:
    channel = Channel(os.dup(fd))
    try:
        _send(guest, channel)
    finally:
        channel.close()


def _write_zstd(guest: ParkedGuest, fd: int, level: int) -> None:
    if level not in ZSTD_LEVELS:
        raise StoreError(f"level {level}, expected {ZSTD_LEVELS[0]} to {ZSTD_LEVELS[-1]}")
    compressor = Compressor(fd, level)
    try:
        _send(guest, compressor.channel)
    except ChannelError:
        # Why the compressor went away says more than the broken pipe.
        compressor.finish()
        raise
    compressor.finish()


def _write_libvirt(guest: ParkedGuest, fd: int, image: LibvirtImage, path: str) -> None:
    image = LibvirtImage(
        image.domain_xml,
        guest.next_run_state == RUNNING,
        cookie_xml=image.cookie_xml,
    )
    head = encode_libvirt_image(image, partial=True)
    os.write(fd, head)
    _write_plain(guest, fd)
    os.fsync(fd)
    # As libvirt does it: the magic that says that the image is whole comes last.
    os.pwrite(fd, encode_libvirt_image(image)[:16], 0)
    if read_libvirt_image(fd, path).stream_position != len(head):
        raise StoreError(f"'{path}' does not read back as it was written")


def _domain(own: LibvirtImage | None, wanted: Conversion) -> LibvirtImage:
    """Domain XML for a save image: as it was given, else the source's own."""
    path = wanted.domain
    if path is None:
        if own is None:
            raise StoreError(
                "libvirt's save image holds the domain's XML: give it with --domain, as "
                "'virsh dumpxml' or 'virsh save-image-dumpxml' prints it, or a save image"
            )
        return own
    fd = open_file(path)
    try:
        if is_libvirt_image(os.pread(fd, 16, 0)):
            return read_libvirt_image(fd, str(path))
    finally:
        os.close(fd)
    xml = path.read_bytes().strip(b"\0\n ")
    if b"<domain" not in xml or b"\0" in xml:
        raise StoreError(f"'{path}' is no domain XML")
    return LibvirtImage(xml + b"\n", was_running=True)


def _send(guest: ParkedGuest, channel: Channel) -> None:
    """The plain stream of a guest."""
    dialect = dialect_of(guest.identity.machine, guest.seen)
    saver = RamSaver(
        channel,
        list(guest.ram),
        section_id=free_section_id(list(guest.devices)),
        has_footers=dialect.send_section_footers,
        page_size=guest.page_size,
        stats=OutgoingStats(page_size=guest.page_size, total_bytes=guest.ram_bytes),
        limiter=RateLimiter(0),
        clock=SystemClock(),
        wait=_no_wait,
    )
    uuid = guest.identity.uuid
    channel.send(stream_head(guest, dialect, return_path=False, uuid=uuid) + saver.setup_bytes())
    saver.save_all()
    channel.send(stream_tail(guest, dialect, saver.end_bytes()))


def _no_wait(delay_s: float) -> None:
    raise AssertionError(f"no bandwidth limit was set, but a wait of {delay_s} s asked for")

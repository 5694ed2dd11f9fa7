"""A guest into a mapped-ram file: each page has its place, so nothing waits for anything.

Reference: stream format 8.3. QEMU writes the same file page by page, with ``multifd`` on
several channels.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.errors import MigrationError
from migrationd.guest.base import Guest, GuestIdentity, Live
from migrationd.guest.device import DeviceState
from migrationd.guest.guest_file import GuestFile
from migrationd.guest.instant import Piece
from migrationd.guest.memory import FileMemory, page_runs
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.dialect import Dialect
from migrationd.outgoing.device_save import EMPTY_VMDESCRIPTION
from migrationd.store.mapped_ram import Layout, plan_layout
from migrationd.store.mapped_ram_writer import MappedRamWriter
from migrationd.store.page_writer import CHUNK_BYTES, PageSource, PageWriter

SCAN_PAGES = 4096
"""Pages whose contents are looked at in one go: 16 MiB."""


class MappedRamSaver:
    """Writes one guest; its methods are called in their order by one thread.

    Args:
        fd: File, open for writing; stays the caller's.
        guest: The guest; only read.
        dialect: Its wire dialect.
        uuid: UUID to put into the configuration, 16 bytes, or None.
        position: Where the stream begins in the file.
        writers: Threads that write pages.
        direct_io: As for :class:`PageWriter`.
        chunk_bytes: As for :class:`PageWriter`.
        on_written: As for :class:`PageWriter`.

    Raises:
        MigrationError: The guest cannot be in such a file.
    """

    def __init__(
        self,
        fd: int,
        guest: Guest,
        dialect: Dialect,
        *,
        uuid: bytes | None = None,
        position: int = 0,
        writers: int = 1,
        direct_io: bool = False,
        chunk_bytes: Callable[[], int] = lambda: CHUNK_BYTES,
        on_written: Callable[[int, int], None] = lambda _bytes, _pages: None,
    ) -> None:
        self._guest = guest
        self._dialect = dialect
        self._layout = guest_layout(
            guest.identity, guest.devices, guest.ram, guest.page_size, uuid=uuid, position=position
        )
        self._writer = MappedRamWriter(fd, self._layout, position=position)
        self._fd = fd
        self._writers = writers
        self._direct_io = direct_io
        self._chunk_bytes = chunk_bytes
        self._on_written = on_written
        self._present: list[npt.NDArray[np.bool_]] = []

    def begin(self) -> int:
        """Write the head.

        Returns:
            Bytes of it.

        Raises:
            OSError: As the calls.
        """
        self._writer.write_head()
        return sum(len(data) for _, data in self._layout.pieces)

    def save_pages(self) -> int:
        """Write every page that is not zero; a guest that executes must stand still by now.

        Returns:
            Zero pages.

        Raises:
            StoreError: Direct I/O is wanted, and the file system has none.
            OSError: The file takes nothing more.
            Exception: What ``chunk_bytes`` raised.
        """
        guest = self._guest
        self._present = [present_pages(block, guest.live) for block in guest.ram]
        writer = PageWriter(
            self._fd,
            [
                page_source(block, present, guest.file)
                for block, present in zip(guest.ram, self._present, strict=True)
            ],
            self._layout.blocks,
            writers=self._writers,
            direct_io=self._direct_io,
            chunk_bytes=self._chunk_bytes,
            on_written=self._on_written,
        )
        try:
            writer.write()
        finally:
            writer.close()
        return self._zero_count()

    def keep_pages(self) -> int:
        """The pages are in the file already, at the places of :func:`guest_layout`.

        Returns:
            Zero pages.
        """
        self._present = [block.present for block in self._guest.ram]
        return self._zero_count()

    def save_pieces(self, pieces: Iterable[Piece]) -> int:
        """Write every page that is not zero, as it was at an instant.

        Args:
            pieces: Every page once, in any order.

        Returns:
            Zero pages.

        Raises:
            StoreError: As :meth:`save_pages`, and so are the others.
            OSError: The file takes nothing more.
            Exception: What ``chunk_bytes`` raised.
        """
        ram = self._guest.ram
        self._present = [np.zeros(block.page_count, np.bool_) for block in ram]
        writer = PageWriter(
            self._fd,
            (),
            (),
            direct_io=self._direct_io,
            chunk_bytes=self._chunk_bytes,
            on_written=self._on_written,
        )
        try:
            for piece in pieces:
                if piece.content is None:
                    continue
                words = piece.content.view(np.uint64)
                is_full = np.bitwise_or.reduce(words, axis=1)[piece.rows] != 0
                pages = piece.pages[is_full]
                self._present[piece.block][pages] = True
                place = self._layout.blocks[piece.block]
                runs = page_runs(pages)
                rows = piece.rows[np.searchsorted(piece.pages, runs[:, 0])]
                writer.write_runs(place, runs, rows, piece.content)
        finally:
            writer.close()
        return self._zero_count()

    def _zero_count(self) -> int:
        return sum(len(present) - int(np.count_nonzero(present)) for present in self._present)

    def finish(self) -> int:
        """Write bitmaps, device sections and description; the file is whole then.

        Returns:
            Bytes of them.

        Raises:
            OSError: As the calls.
        """
        size = self._writer.write_rest(
            self._present,
            self._sections(lambda device: device.is_of_setup and not device.is_early),
            self._sections(lambda device: not device.is_of_setup),
            self._guest.vmdescription or EMPTY_VMDESCRIPTION,
            switchover_start=self._dialect.send_switchover_start,
        )
        bitmaps = sum(block.bitmap_bytes for block in self._layout.blocks)
        return size - self._layout.tail_position + bitmaps

    def read_back(self, path: str) -> None:
        """Read the finished file; the descriptor must be open for reading as well.

        Raises:
            StoreError: It does not read back as it was written.
        """
        self._writer.read_back(
            self._sections(lambda device: device.is_of_setup),
            self._sections(lambda device: not device.is_of_setup),
            path,
        )

    def _sections(self, is_wanted: Callable[[DeviceState], bool]) -> list[OpaqueSection]:
        return [device.to_section() for device in self._guest.devices if is_wanted(device)]


def guest_layout(
    identity: GuestIdentity,
    devices: Sequence[DeviceState],
    blocks: Sequence[RamBlock | RamBlockSpec],
    page_size: int,
    *,
    uuid: bytes | None,
    position: int = 0,
) -> Layout:
    """Where a guest goes in a file.

    Args:
        identity: Its configuration.
        devices: Its sections; those that precede RAM count.
        blocks: Its blocks, in order.
        page_size: Target page size in bytes.
        uuid: As for :class:`MappedRamSaver`.
        position: As for :class:`MappedRamSaver`.

    Raises:
        MigrationError: The guest cannot be in such a file.
    """
    if identity.machine is None:
        raise MigrationError("a guest without a machine type cannot be in a mapped-ram file")
    return plan_layout(
        Configuration(identity.machine, identity.target_page_bits, None, uuid),
        [device.to_section() for device in devices if device.is_early],
        [(block.idstr, block.used_length) for block in blocks],
        page_size,
        position=position,
    )


def page_source(
    block: RamBlock, present: npt.NDArray[np.bool_], file: GuestFile | None
) -> PageSource:
    """What is written of a block.

    Args:
        block: The block.
        present: One bool per page: it is not zero.
        file: The file that its pages are in, or None.
    """
    memory = block.memory
    if file is None or not isinstance(memory, FileMemory):
        return PageSource(memory.view, present, block.page_size)
    return PageSource(memory.view, present, block.page_size, file.fd, memory.position)


def present_pages(block: RamBlock, live: Live | None) -> npt.NDArray[np.bool_]:
    """Which pages of a block are not zero; of a guest that executes, by looking.

    Args:
        block: The block.
        live: The guest it belongs to, if it can execute; it stands still.

    Returns:
        One bool per page, shape ``(n,)``.
    """
    if live is None:
        return block.present
    present = np.zeros(block.page_count, np.bool_)
    words = block.memory.view.view(np.uint64).reshape(block.page_count, block.page_size // 8)
    for first, count in live.touched_runs(block).tolist():
        for start in range(first, first + count, SCAN_PAGES):
            end = min(start + SCAN_PAGES, first + count)
            present[start:end] = words[start:end].any(axis=1)
    return present

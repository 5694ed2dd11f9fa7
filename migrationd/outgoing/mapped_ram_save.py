"""A guest into a mapped-ram file: each page has its place, so nothing waits for anything.

Work is runs of pages, never pages. A gap of zero pages shorter than ``GAP_BYTES`` is written
with the run that it interrupts: its content does not count, for the bitmap says zero. Long
runs bypass the page cache where the file system can (the file is synced before the migration
completes, so a cache would only be another copy); short ones go through it. Pages that are in
a file already are shared with it (reflink) where the file system can.

Reference: stream format 8.3. QEMU writes the same file page by page, with ``multifd`` on
several channels.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.errors import MigrationError
from migrationd.guest.base import Guest
from migrationd.guest.memory import FileMemory
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.clone import can_offload, clone_range, copy_range
from migrationd.linux.iovec import address_of
from migrationd.migration.dialect import Dialect
from migrationd.store.mapped_ram import PlacedBlock, plan_layout, write_at
from migrationd.store.mapped_ram_writer import MappedRamWriter

GAP_BYTES = 64 << 10
"""Shorter gaps between runs are not worth a hole."""

DIRECT_BYTES = 128 << 10
"""Shorter runs go through the page cache: a direct write waits for the disk."""

CHUNK_BYTES = 4 << 20
"""Bytes of one write."""

DIRECT_ALIGNMENT = 4096
EMPTY_VMDESCRIPTION = b"{}"

Pages = npt.NDArray[np.int64]
Chunk = tuple[RamBlock, PlacedBlock, int, int]
"""Block, its places, first page, pages."""


class MappedRamSaver:
    """Writes one guest; its methods are called in their order by one thread.

    Args:
        fd: File, open for writing; stays the caller's.
        guest: The guest; only read.
        dialect: Its wire dialect.
        uuid: UUID to put into the configuration, 16 bytes, or None.
        position: Where the stream begins in the file.
        writers: Threads that write pages.
        direct_io: Bypass the page cache for every page that allows it, and fail where the
            file system cannot; otherwise it is used where it helps.
        chunk_bytes: Asked before each write: its most bytes; may wait, and raises to end it.
        on_written: Told of bytes and pages written; called by several threads.

    Raises:
        MigrationError: The guest cannot be in such a file.
        OSError: The file cannot be opened as asked.
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
        identity = guest.identity
        if identity.machine is None:
            raise MigrationError("a guest without a machine type cannot be in a mapped-ram file")
        self._fd = fd
        self._guest = guest
        self._dialect = dialect
        self._writers = writers
        self._chunk_bytes = chunk_bytes
        self._on_written = on_written
        self._lock = threading.Lock()
        self._layout = plan_layout(
            Configuration(identity.machine, identity.target_page_bits, None, uuid),
            [d.to_section() for d in guest.devices if d.is_early],
            [(block.idstr, block.used_length) for block in guest.ram],
            guest.page_size,
            position=position,
        )
        self._writer = MappedRamWriter(fd, self._layout, position=position)
        self._needs_direct = direct_io
        self._direct_fd = self._open_direct()

    def begin(self) -> int:
        """Write the head.

        Returns:
            Bytes of it.

        Raises:
            OSError: As the calls.
        """
        self._writer.write_head()
        return sum(len(data) for _, data in self._layout.pieces)

    def save_pages(self) -> None:
        """Write every page that is not zero.

        Raises:
            OSError: The file takes nothing more.
            Exception: What ``chunk_bytes`` raised.
        """
        chunks = self._chunks()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not failures:
                    with self._lock:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    self._write_chunk(*chunk)
            except BaseException as error:
                failures.append(error)

        others = [
            threading.Thread(target=work, name=f"mapped-ram {number}", daemon=True)
            for number in range(1, self._writers)
        ]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
        if failures:
            raise failures[0]

    def finish(self) -> int:
        """Write bitmaps, device sections and description; the file is whole then.

        Returns:
            Bytes of them.

        Raises:
            OSError: As the calls.
        """
        late = [d for d in self._guest.devices if not d.is_of_setup]
        setup = [d.to_section() for d in self._guest.devices if d.is_of_setup and not d.is_early]
        size = self._writer.write_rest(
            [block.present for block in self._guest.ram],
            setup,
            [d.to_section() for d in late],
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

    def close(self) -> None:
        """Release what was opened here."""
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None

    def _sections(self, wanted: Callable[..., bool]) -> Sequence[OpaqueSection]:
        return [device.to_section() for device in self._guest.devices if wanted(device)]

    def _open_direct(self) -> int | None:
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT
        try:
            return os.open(f"/proc/self/fd/{self._fd}", flags)
        except OSError:
            if self._needs_direct:
                raise
            return None

    def _chunks(self) -> Iterator[Chunk]:
        """What is left to be written, in the order of the file."""
        for block, place in zip(self._guest.ram, self._layout.blocks, strict=True):
            if self._share(block, place):
                continue
            for first, count in runs_to_write(block.present, block.page_size).tolist():
                done = 0
                while done < count:
                    step = max(1, min(count - done, self._chunk_bytes() // block.page_size))
                    yield block, place, first + done, step
                    done += step

    def _share(self, block: RamBlock, place: PlacedBlock) -> bool:
        """Let the new file share the pages of the guest's file, if both allow it."""
        file, memory = self._guest.file, block.memory
        if file is None or not isinstance(memory, FileMemory):
            return False
        length = block.used_length
        whole = length // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        if whole and clone_range(file.fd, memory.position, self._fd, place.pages_position, whole):
            if whole < length:
                write_at(self._fd, memory.view[whole:].data, place.pages_position + whole)
        elif can_offload(file.fd, self._fd):
            for first, count in runs_to_write(block.present, block.page_size).tolist():
                start, size = first * block.page_size, count * block.page_size
                source, target = memory.position + start, place.pages_position + start
                copy_range(file.fd, source, self._fd, target, size)
        else:
            return False
        self._on_written(block.present_count * block.page_size, block.present_count)
        return True

    def _write_chunk(self, block: RamBlock, place: PlacedBlock, first: int, count: int) -> None:
        start, end = first * block.page_size, (first + count) * block.page_size
        content = block.memory.view[start:end]
        position = place.pages_position + start
        present = int(np.count_nonzero(block.present[first : first + count]))
        if self._may_bypass(content, position):
            self._write_direct(content, position)
        else:
            write_at(self._fd, content.data, position)
        self._on_written(len(content), present)

    def _may_bypass(self, content: npt.NDArray[np.uint8], position: int) -> bool:
        if self._direct_fd is None or (len(content) < DIRECT_BYTES and not self._needs_direct):
            return False
        # Memory and file must begin alike within a block of the disk.
        return not (address_of(content) | position) % DIRECT_ALIGNMENT

    def _write_direct(self, content: npt.NDArray[np.uint8], position: int) -> None:
        whole = len(content) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        assert self._direct_fd is not None
        try:
            write_at(self._direct_fd, content[:whole].data, position)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A disk with larger blocks: the page cache takes any.
            write_at(self._fd, content[:whole].data, position)
        if whole < len(content):
            write_at(self._fd, content[whole:].data, position + whole)


def runs_to_write(present: npt.NDArray[np.bool_], page_size: int) -> Pages:
    """Runs of present pages, with the short gaps between them.

    Args:
        present: One bool per page, shape ``(n,)``.
        page_size: Bytes of a page.

    Returns:
        First page and count of each run, shape ``(m, 2)``.
    """
    edges = np.flatnonzero(np.diff(present.view(np.int8), prepend=0, append=0))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return np.empty((0, 2), np.int64)
    is_far = (begins[1:] - ends[:-1]) * page_size >= GAP_BYTES
    first = begins[np.concatenate(([True], is_far))]
    last = ends[np.concatenate((is_far, [True]))]
    return np.stack((first, last - first), axis=1)

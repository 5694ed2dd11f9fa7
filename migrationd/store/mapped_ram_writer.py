"""Writing a mapped-ram file, page contents apart.

Who places the pages is the caller's affair: they may come from a stream, or be shared with
the file that they are in already.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.codec.records import OpaqueSection
from migrationd.codec.vmdescription import with_configuration
from migrationd.errors import StoreError
from migrationd.store.mapped_ram import Layout, encode_tail, write_at, write_bitmap
from migrationd.store.mapped_ram_reader import read_contents


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a finished file is known by.

    Attributes:
        size: Bytes.
        metadata_crc32: Sum of everything but pages.
    """

    size: int
    metadata_crc32: int


class MappedRamWriter:
    """Head, bitmaps and tail of one file.

    Args:
        fd: File, open for writing; stays the caller's.
        layout: Where everything goes.
        position: Where the stream begins in it.
    """

    def __init__(self, fd: int, layout: Layout, *, position: int = 0) -> None:
        self._fd = fd
        self._layout = layout
        self._position = position

    def write_head(self) -> None:
        """Make the file as long as its head and pages areas need, and write the head.

        Raises:
            OSError: As the calls.
        """
        os.ftruncate(self._fd, self._layout.tail_position)
        for position, data in self._layout.pieces:
            write_at(self._fd, data, position)

    def write_rest(
        self,
        present: Sequence[npt.NDArray[np.bool_]],
        setup: Sequence[OpaqueSection],
        late: Sequence[OpaqueSection],
        vmdescription: bytes,
        *,
        switchover_start: bool,
    ) -> int:
        """Write bitmaps and tail; the file is complete then, but not synced.

        Args:
            present: For each block, one bool per page.
            setup: Sections of the setup phase that are not in the layout.
            late: Sections after the setup phase, in order.
            vmdescription: JSON; its words on the configuration are made to fit this file.
            switchover_start: Whether the machine type sends SWITCHOVER_START.

        Returns:
            Size of the file in bytes.

        Raises:
            OSError: As the calls.
        """
        for block, bools in zip(self._layout.blocks, present, strict=True):
            write_bitmap(self._fd, block, bools)
        description = with_configuration(vmdescription, self._layout.configuration)
        tail = encode_tail(setup, late, description, switchover_start=switchover_start)
        write_at(self._fd, tail, self._layout.tail_position)
        size = self._layout.tail_position + len(tail)
        os.ftruncate(self._fd, size)
        return size

    def read_back(
        self, early: Sequence[OpaqueSection], late: Sequence[OpaqueSection], path: str
    ) -> WrittenFile:
        """Read what was written: sections are framed by their contents.

        Args:
            early: Sections of the setup phase.
            late: Sections after it.
            path: Name of the file, for messages.

        Raises:
            StoreError: What is read is not what was written.
        """
        contents = read_contents(self._fd, path, position=self._position)
        if (
            contents.blocks != self._layout.blocks
            or list(contents.early) != list(early)
            or list(contents.late) != list(late)
        ):
            raise StoreError(f"'{path}' does not read back as it was written")
        return WrittenFile(os.fstat(self._fd).st_size, contents.metadata_crc32)

"""What a migration file holds, page contents apart; for any of its forms.

A mapped-ram file is not read through: its bitmaps say it. A stream is decoded from its
first byte to its last, and each page is counted with what came last for it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migrationd.codec.constants import QEMU_VM_SECTION_FULL
from migrationd.codec.device_fields import DeviceDescription, describe_devices
from migrationd.codec.ram import inflate_page
from migrationd.codec.records import (
    Command,
    CompressedPage,
    Configuration,
    EndOfStream,
    FileHeader,
    MixedBatch,
    MultifdFlush,
    OpaqueSection,
    Package,
    PageBatch,
    RamBlockList,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    VmDescription,
    XbzrleBatch,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import StreamCorrupt, StreamError
from migrationd.guest.device import DeviceState
from migrationd.guest.run_state import PAUSED, RUNNING, decode_run_state
from migrationd.migration.dirty_bitmaps import DirtyBitmap, bitmaps_of
from migrationd.pageops.xbzrle import decode_page
from migrationd.store.compressed import PlainStream
from migrationd.store.container import Container, opened
from migrationd.store.mapped_ram_reader import RAM_LIMIT_BYTES, read_bitmap, read_contents
from migrationd.transport.channel import Channel


@dataclass(slots=True)
class BlockSummary:
    """One RAM block.

    Attributes:
        present: Pages whose last content is not a zero page, one bool each.
        named: Pages that the file says anything about, one bool each.
        records: Page records; more than pages if some came again.
    """

    idstr: str
    used_length: int
    page_size: int
    present: npt.NDArray[np.bool_]
    named: npt.NDArray[np.bool_]
    records: int = 0

    @property
    def page_count(self) -> int:
        """Pages."""
        return len(self.present)

    @property
    def present_count(self) -> int:
        """Pages that are not zero."""
        return int(np.count_nonzero(self.present))

    @property
    def zero_share(self) -> float:
        """Zero pages of all pages, 0 to 1."""
        return 1 - self.present_count / self.page_count


@dataclass(slots=True)
class FileSummary:
    """A file.

    Attributes:
        sections: Sections that are not RAM, in order.
        records: How many records of each kind came; empty for a mapped-ram file.
        pages_elsewhere: Pages went over multifd channels, which are not in the file.
        end_position: Where the stream ended in the (decompressed) data; None if it did not.
    """

    path: Path
    container: Container
    configuration: Configuration | None = None
    page_size: int = 4096
    blocks: list[BlockSummary] = field(default_factory=list)
    sections: list[OpaqueSection] = field(default_factory=list)
    description: bytes | None = None
    commands: list[Command] = field(default_factory=list)
    records: Counter[str] = field(default_factory=Counter)
    pages_elsewhere: bool = False
    end_position: int | None = None
    metadata_crc32: int | None = None

    @property
    def devices(self) -> list[OpaqueSection]:
        """The FULL sections."""
        return [section for section in self.sections if section.kind == QEMU_VM_SECTION_FULL]

    @property
    def ram_bytes(self) -> int:
        """RAM of all blocks."""
        return sum(block.used_length for block in self.blocks)

    @property
    def present_bytes(self) -> int:
        """RAM that is not zero pages."""
        return sum(block.present_count * block.page_size for block in self.blocks)

    @property
    def run_state(self) -> str | None:
        """Run state that the guest will have; None if none travels."""
        if (libvirt := self.container.libvirt) is not None:
            return RUNNING if libvirt.was_running else PAUSED
        for section in self.devices:
            if section.idstr == "globalstate":
                return decode_run_state(section.body)
        return None

    def dirty_bitmaps(self) -> tuple[DirtyBitmap, ...]:
        """Block dirty bitmaps.

        Raises:
            StreamCorrupt: Their sections are malformed.
        """
        return bitmaps_of([DeviceState.of_section(s, in_setup=False) for s in self.sections])

    def described(self) -> dict[tuple[str, int], DeviceDescription]:
        """Descriptions by idstr and instance; empty without a usable VMDESCRIPTION."""
        try:
            found = describe_devices(self.description or b"{}")
        except ValueError:
            return {}
        return {(device.idstr, device.instance_id): device for device in found}


def summarize(path: Path, *, position: int = 0) -> FileSummary:
    """Read a file.

    Args:
        path: The file.
        position: Where its stream begins (``file:PATH,offset=N``).

    Raises:
        StoreError: It is no complete migration file.
        StreamError: Its stream is damaged; with the position.
        ChannelError: It cannot be read.
    """
    with opened(path, position=position) as (fd, container):
        summary = FileSummary(path, container)
        if container.is_mapped_ram:
            _read_mapped_ram(fd, summary)
        else:
            with PlainStream(fd, container, str(path)) as stream:
                _StreamReader(stream.channel, summary).read()
        return summary


def _read_mapped_ram(fd: int, summary: FileSummary) -> None:
    contents = read_contents(fd, str(summary.path), position=summary.container.position)
    summary.configuration = contents.configuration
    summary.sections = [*contents.early, *contents.late]
    summary.description = contents.vmdescription
    summary.metadata_crc32 = contents.metadata_crc32
    for block in contents.blocks:
        present = read_bitmap(fd, block)
        summary.page_size = block.page_size
        summary.blocks.append(
            BlockSummary(
                block.idstr,
                block.used_length,
                block.page_size,
                present,
                np.ones(len(present), np.bool_),
                int(np.count_nonzero(present)),
            )
        )


class _StreamReader:
    """Counts what a stream brings."""

    def __init__(self, channel: Channel, summary: FileSummary) -> None:
        self._channel = channel
        self._summary = summary
        self._decoder = StreamDecoder(StreamLimits(ram_bytes=RAM_LIMIT_BYTES))

    def read(self) -> None:
        """Read to the end.

        Raises:
            StreamError: The stream is damaged.
        """
        decoder, summary = self._decoder, self._summary
        try:
            while not decoder.finished:
                record = decoder.next_record()
                if record is not None:
                    self._count(record)
                elif not decoder.finished:
                    self._receive()
        except StreamError as error:
            if error.position is not None and summary.container.compression == "none":
                error.position += summary.container.position
            raise
        summary.end_position = decoder.position
        summary.page_size = decoder.page_size
        # A decompressor checks its sums only at its end.
        rest = memoryview(bytearray(1 << 16))
        while self._channel.recv_into(rest, None) and summary.container.compression != "none":
            pass

    def _receive(self) -> None:
        view = self._decoder.receive_view()
        count = self._channel.recv_into(view, None)
        view.release()
        if count:
            self._decoder.received(count)
        else:
            self._decoder.feed_eof()

    def _count(self, record: Record) -> None:
        summary = self._summary
        match record:
            case PageBatch(block, pages):
                self._pages("page", block, pages, True)
            case ZeroBatch(block, pages, fill):
                self._pages("zero page", block, pages, bool(fill))
            case MixedBatch(block, pages, content_at):
                is_full = np.array(content_at) >= 0
                self._pages("page", block, np.array(pages)[is_full], True)
                self._pages("zero page", block, np.array(pages)[~is_full], False)
            case XbzrleBatch():
                for index in range(len(record.pages)):
                    self._count(record.single(index))
            case XbzrlePage(block, page, encoded):
                self._check(lambda: decode_page(encoded, bytearray(self._decoder.page_size)))
                self._pages("XBZRLE page", block, np.array([page]), True)
            case CompressedPage(block, page, compressed):
                self._check(lambda: inflate_page(compressed, self._decoder.page_size))
                self._pages("compressed page", block, np.array([page]), True)
            case RamBlockList(_, entries):
                size = self._decoder.page_size
                for entry in entries:
                    flags = np.zeros((2, entry.used_length // size), np.bool_)
                    summary.blocks.append(
                        BlockSummary(entry.idstr, entry.used_length, size, flags[0], flags[1])
                    )
            case OpaqueSection():
                summary.sections.append(record)
            case Package(records):
                for inner in records:
                    self._count(inner)
            case Configuration():
                summary.configuration = record
            case VmDescription(json):
                summary.description = json
            case Command():
                summary.commands.append(record)
            case MultifdFlush():
                summary.pages_elsewhere = True
            case SectionHeader(kind):
                summary.records[f"ram {_KINDS[kind]}"] += 1
            case FileHeader() | SectionFooter() | RamEos() | EndOfStream():
                pass

    def _check(self, decode: Callable[[], object]) -> None:
        try:
            decode()
        except ValueError as error:
            raise StreamCorrupt(f"{error}", position=self._decoder.position) from None

    def _pages(self, kind: str, index: int, pages: npt.NDArray[np.int64], is_full: bool) -> None:
        if len(pages):
            block = self._summary.blocks[index]
            block.present[pages] = is_full
            block.named[pages] = True
            block.records += len(pages)
            self._summary.records[kind] += len(pages)


_KINDS = {1: "START", 2: "PART", 3: "END", 4: "FULL"}

"""Bytes from the source to a parked guest, one bounded step at a time.

A step runs in an executor thread: it receives, decodes and places pages until a
record comes that the driver must see in order, the step's budget is used up, or
nothing comes for a while. RAM pages never leave the thread.

Reference: order and meaning of the elements follow stream format 1.4, 2 and 6.1-6.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.ram import RamDecoder, inflate_page
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
from migrationd.codec.stream import StreamDecoder
from migrationd.errors import StreamCorrupt, StreamTruncated, StreamUnsupported
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import distinct
from migrationd.guest.ram_block import RamBlock
from migrationd.incoming.direct_receive import DirectReceiver, RunGuess
from migrationd.incoming.kept_sections import KeptSections
from migrationd.incoming.multifd_receive import Multifd
from migrationd.incoming.pages import place_record
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.pageops.xbzrle import decode_page, decode_pages
from migrationd.transport.channel import Channel

STEP_BUDGET_BYTES = 64 << 20
"""A step hands back to the event loop after this many bytes."""

QUIET_S = 0.25
"""A step hands back when nothing came for this long."""

DESCRIPTION_WAIT_S = 2.0
"""After a silence of this length the decoder decides with what it has: some machine types
suppress the VMDESCRIPTION behind EOF, and with a return path the source does not close."""

FILL_BYTES = 256 << 10
"""Receive up to this much before decoding, as long as more is there."""

PEEK_BYTES = 16 << 10
"""Receive no more than this where a long run is likely to begin: the rest can go straight to its
place."""


class Pause(Enum):
    """Why a step ended without a record for the driver."""

    BUDGET = "budget"
    QUIET = "quiet"
    FINISHED = "finished"


Barrier = Configuration | Command | RamBlockList | Package
"""Records that the driver handles before the stream goes on."""


@dataclass(slots=True)
class Arrival:
    """What the stream has brought so far, besides page contents."""

    configuration: Configuration | None = None
    devices: list[DeviceState] = field(default_factory=list)
    vmdescription: bytes | None = None
    has_footers: bool = True
    has_switchover_start: bool = False
    first_byte_seen: bool = False


class StreamLoader:
    """Reads one precopy stream.

    Args:
        channel: Where the stream comes from.
        decoder: A fresh decoder with the limits of this daemon.
        on_first_bytes: Called once, on the stepping thread, when a stream has begun: what does not
            begin like one never does.
        multifd: Channels that carry pages besides this stream.
        mapping: ``block-bitmap-mapping``: under which names dirty bitmaps are kept.

    One step runs at a time; between steps the event loop may read every attribute.
    """

    def __init__(
        self,
        channel: Channel,
        decoder: StreamDecoder,
        on_first_bytes: Callable[[], object],
        multifd: Multifd | None = None,
        mapping: BitmapMapping | None = None,
    ) -> None:
        self._channel = channel
        self._multifd = multifd
        self._decoder = decoder
        self._on_first_bytes = on_first_bytes
        self._blocks: Sequence[RamBlock] | None = None
        self._ended_handlers: set[tuple[str, int]] = set()
        self._in_setup = True
        self._section: str | None = None
        self._input_ended = False
        self._quiet_s = 0.0
        self._run = RunGuess()
        self._direct = DirectReceiver(channel, decoder, QUIET_S)
        self._is_postcopy = False
        self._awaits_resume = False
        self.arrival = Arrival()
        self._kept = KeptSections(mapping, self.arrival.devices)

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """RAM blocks, in the order of the block list; none before it."""
        return self._blocks or ()

    def listen(self) -> None:
        """From now on pages come by postcopy.

        None is received straight into memory any more: what a break leaves half received
        there would have to be undone, and another channel may bring pages, too.
        """
        self._is_postcopy = True
        self._run.ended()
        # With dirty bitmaps alone, RAM ends before the switch and once more behind it.
        self._ended_handlers.clear()

    def resume(self, channel: Channel) -> None:
        """Go on with the stream on another connection, after :meth:`listen`.

        It brings commands only, until :meth:`pages_may_come`.

        Raises:
            InvalidState: The stream did not turn to postcopy.
        """
        self._decoder = self._decoder.resumed()
        self._channel = channel
        self._multifd = None
        self._direct = DirectReceiver(channel, self._decoder, QUIET_S)
        self._ended_handlers.clear()
        self._section = None
        self._input_ended = False
        self._quiet_s = 0.0
        self._awaits_resume = True

    def pages_may_come(self) -> None:
        """Both sides know which pages are missing."""
        self._awaits_resume = False

    @property
    def has_sections(self) -> bool:
        """Whether any section has come."""
        return self._blocks is not None or bool(self._kept)

    @property
    def decoder(self) -> StreamDecoder:
        """Of the stream."""
        return self._decoder

    def fork_ram(self) -> RamDecoder | None:
        """A decoder for RAM records of another channel; None before the block list."""
        return self._decoder.fork_ram()

    @property
    def position(self) -> int:
        """Stream position of the next undecoded byte."""
        return self._decoder.position

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return self._decoder.page_size

    def use_blocks(self, blocks: Sequence[RamBlock]) -> None:
        """Place pages into these blocks, in the order of the block list."""
        self._blocks = blocks

    def step(self) -> Barrier | Pause:
        """Go on with the stream.

        Returns:
            A record for the driver, or why there is none.

        Raises:
            StreamError: The stream cannot be accepted.
            ChannelClosed: The channel was shut down or broke.
        """
        received = 0
        while True:
            if self._multifd is not None:
                self._multifd.check()
            record = self._decoder.next_record()
            if not self.arrival.first_byte_seen and self._decoder.position:
                self.arrival.first_byte_seen = True
                self._on_first_bytes()
            if record is not None:
                barrier = self._apply(record)
                if barrier is not None:
                    return barrier
                continue
            if self._decoder.finished:
                return Pause.FINISHED
            if received >= STEP_BUDGET_BYTES:
                return Pause.BUDGET
            try:
                received += self._receive_direct() or self._receive()
            except TimeoutError:
                self._quiet_s += QUIET_S
                if self._quiet_s >= DESCRIPTION_WAIT_S:
                    self._decoder.idle()
                return Pause.QUIET

    def _receive_direct(self) -> int:
        """Receive the rest of a run of pages straight into guest memory, if there is one.

        Returns:
            Bytes received; 0 if nothing was tried.

        Raises:
            ChannelClosed: The channel was shut down or broke.
        """
        total = 0
        while total < STEP_BUDGET_BYTES and (most := self._run.pages_ahead()):
            assert self._run.next is not None
            block, page = self._run.next
            count = self._direct.window(block, page, most)
            if not count:
                break
            placed, received = self._direct.receive(block, page, count)
            total += received
            self._run.saw(block, page, placed)
            if placed < count:
                # Over, or only paused: what comes next tells.
                self._run.interrupted()
        return total

    def _receive(self) -> int:
        """Receive what is there: large reads make long rows of pages.

        Returns:
            Bytes received; 0 at the end of the input.

        Raises:
            TimeoutError: Nothing came for a while.
            ChannelClosed: The channel was shut down or broke.
        """
        view = self._decoder.receive_view()
        is_peek = self._run.is_between
        total = self._channel.recv_into(view[:PEEK_BYTES] if is_peek else view, QUIET_S)
        if not total:
            self._end_of_input()
            return 0
        self._quiet_s = 0.0
        self._decoder.received(total)
        while total < FILL_BYTES and not is_peek:
            try:
                count = self._channel.recv_into(self._decoder.receive_view(), 0)
            except TimeoutError:
                break
            if not count:
                break
            self._decoder.received(count)
            total += count
        return total

    def _end_of_input(self) -> None:
        if self._input_ended:
            raise StreamTruncated(
                "the source closed the connection before the end of the stream",
                position=self.position,
                section=self._section,
                hint="look at the source's error-desc",
            )
        self._input_ended = True
        self._decoder.feed_eof()

    def _apply(self, record: Record) -> Barrier | None:
        self._run.interrupted()
        match record:
            case PageBatch():
                block = self._block(record.block)
                place_record(block, record, self.position)
                if record.is_run and not self._is_postcopy:
                    self._run.saw(block, int(record.pages[0]), len(record.pages))
                else:
                    self._run.ended()
            case MixedBatch():
                block = self._block(record.block)
                place_record(block, record, self.position)
                if not self._is_postcopy:
                    self._run.saw_mixed(block, record.pages, record.content_at)
            case ZeroBatch():
                place_record(self._block(record.block), record, self.position)
            case XbzrlePage() | XbzrleBatch():
                if self._is_postcopy:
                    raise StreamCorrupt("an XBZRLE page in postcopy", position=self.position)
                if isinstance(record, XbzrlePage):
                    self._apply_xbzrle(record)
                else:
                    self._apply_edits(record)
            case CompressedPage():
                self._apply_compressed(record)
            case SectionHeader():
                self._begin_section(record)
            case SectionFooter():
                self._section = None
            case OpaqueSection():
                self.keep_section(record)
            case VmDescription():
                self.arrival.vmdescription = record.json
            case FileHeader() | EndOfStream():
                pass
            case RamEos():
                if self._multifd is not None:
                    self._multifd.end_of_body()
            case MultifdFlush():
                if self._multifd is None:
                    raise self._unsupported("a multifd stream", "turn the source's multifd off")
                self._multifd.flush()
            case Configuration() | Command() | RamBlockList() | Package():
                return record
        return None

    def _block(self, index: int) -> RamBlock:
        if self._blocks is None:
            raise StreamCorrupt("a page before the RAM block list", position=self.position)
        return self._blocks[index]

    def _apply_edits(self, record: XbzrleBatch) -> None:
        pages = record.pages
        if len(distinct(pages)) < len(pages):
            for index in range(len(pages)):
                self._apply_xbzrle(record.single(index))
            return
        block = self._block(record.block)
        contents = block.memory.view.reshape(block.page_count, -1)[pages]
        contents[~block.present[pages]] = 0
        try:
            data = np.frombuffer(record.buffer, np.uint8)
            decode_pages(data, record.begins, record.ends, contents)
        except ValueError as error:
            raise StreamCorrupt(
                f"XBZRLE pages {pages[0]} to {pages[-1]}: {error}",
                position=self.position,
                block=block.idstr,
            ) from None
        block.place_batch(pages, contents, False)

    def _apply_xbzrle(self, record: XbzrlePage) -> None:
        block = self._block(record.block)
        page = bytearray(block.page(record.page))
        try:
            decode_page(record.encoded, page)
        except ValueError as error:
            raise StreamCorrupt(
                f"XBZRLE page {record.page}: {error}", position=self.position, block=block.idstr
            ) from None
        block.write_page(record.page, page)

    def _apply_compressed(self, record: CompressedPage) -> None:
        block = self._block(record.block)
        try:
            page = inflate_page(record.compressed, block.page_size)
        except ValueError as error:
            raise StreamCorrupt(
                f"compressed page {record.page}: {error}",
                position=self.position,
                block=block.idstr,
            ) from None
        block.write_page(record.page, page)

    def _begin_section(self, header: SectionHeader) -> None:
        key = (header.idstr, header.instance_id)
        if key in self._ended_handlers or (
            header.kind == QEMU_VM_SECTION_START and self._blocks is not None
        ):
            raise StreamCorrupt("duplicate section", position=self.position, section=header.idstr)
        if self._awaits_resume:
            raise StreamCorrupt("pages before POSTCOPY_RESUME", position=self.position)
        if header.kind != QEMU_VM_SECTION_START:
            self._in_setup = False
        if header.kind == QEMU_VM_SECTION_END:
            self._ended_handlers.add(key)
        self._section = header.idstr

    def keep_section(self, section: OpaqueSection) -> None:
        """Keep a section as bytes.

        Raises:
            StreamError: It came twice, never started, is malformed, or there is too much.
        """
        self._kept.keep(section, self.position, in_setup=self._in_setup)
        self.arrival.has_footers = section.has_footer

    def _unsupported(self, what: str, hint: str | None = None) -> StreamUnsupported:
        return StreamUnsupported(
            f"{what} is not taken", position=self.position, section=self._section, hint=hint
        )

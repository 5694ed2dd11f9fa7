"""RAM of a guest to a channel: page search, page kinds, rate.

Everything works on arrays of page numbers; a batch of pages goes out as one
gather write straight from guest memory.

Reference: RAM records, stream format 2.1-2.3. A held guest knows which of its
pages are zero, so nothing is scanned on the way out.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.ram_encode import (
    deflated_records,
    encode_block_list,
    encode_eos,
    encode_named_header,
    name_xbzrle_record,
    page_headers,
    xbzrle_records,
    zero_records,
)
from migrationd.codec.records import RamBlockEntry
from migrationd.codec.section import encode_section_footer, encode_section_header
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.stats import OutgoingStats
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

ZERO_BATCH_PAGES = 16384
"""ZERO records of one write: 9 bytes each, 144 KiB."""

ZERO_RECORD_BYTES = 9

PART_BYTES = 64 << 20
"""A PART is closed after about this much, so that a reader sees the rounds go by."""

Pages = npt.NDArray[np.int64]
Copied = tuple[npt.NDArray[np.uint8], Pages]
"""Contents that were copied, flat, and which of them each page has."""


class RamSaver:
    """The ``ram`` handler of one outgoing migration; used by the outgoing thread only.

    Args:
        channel: Main channel.
        blocks: RAM blocks in the order of the block list.
        section_id: Id of the ``ram`` section.
        has_footers: Whether sections end with a footer.
        batch_pages: Pages of one gather write.
        detects_zeros: Whether zero pages go as such; else whole (``zero-page-detection=none``).
        part_bytes: A PART is closed after about this much; None: only by :meth:`end_parts`.
        limiter: Bandwidth limit; shared with the monitor, which may change its rate.
        wait: Called with seconds to wait for the limit; raises when the migration ends.
        should_stop: Asked before each batch: postcopy is to send the rest.
        names_page_sizes: Whether the block list tells huge pages: in postcopy.
        names_addresses: Whether it tells addresses: with ``x-ignore-shared``.
        sent: By block name one bool per page, set for pages that went out; or None.
    """

    def __init__(
        self,
        channel: Channel,
        blocks: list[RamBlock],
        *,
        section_id: int,
        has_footers: bool,
        page_size: int,
        stats: OutgoingStats,
        limiter: RateLimiter,
        clock: Clock,
        wait: Callable[[float], None],
        batch_pages: int = 512,
        should_stop: Callable[[], bool] = lambda: False,
        sent: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        names_page_sizes: bool = False,
        part_bytes: int | None = PART_BYTES,
        detects_zeros: bool = True,
        names_addresses: bool = False,
    ) -> None:
        self._channel = channel
        self._blocks = blocks
        self._section_id = section_id
        self._footer = encode_section_footer(section_id) if has_footers else b""
        self._page_size = page_size
        self._stats = stats
        self._limiter = limiter
        self._clock = clock
        self._wait = wait
        self._batch_pages = batch_pages
        self._should_stop = should_stop
        self._sent = sent
        self._names_page_sizes = names_page_sizes
        self._names_addresses = names_addresses
        self._part_limit = part_bytes
        self._zeros: npt.NDArray[np.uint8] | None = None
        if not detects_zeros:
            self._zeros = np.zeros(batch_pages * page_size, np.uint8)
        self._named_block: RamBlock | None = None
        self._part_bytes = 0
        self._prefix = b""

    def setup_bytes(self, mark: bytes = b"") -> bytes:
        """START with the block list; ``mark`` stands before its end."""
        return (
            encode_section_header(QEMU_VM_SECTION_START, self._section_id, "ram", 0, 4)
            + encode_block_list(
                tuple(
                    RamBlockEntry(
                        block.idstr,
                        block.used_length,
                        block.backing_page_size if self._names_page_sizes else None,
                        (block.address or 0) if self._names_addresses else None,
                    )
                    for block in self._blocks
                )
            )
            + mark
            + encode_eos()
            + self._footer
        )

    def end_bytes(self) -> bytes:
        """END; all pages went out in PARTs, for a held guest dirties none."""
        return (
            encode_section_header(QEMU_VM_SECTION_END, self._section_id)
            + encode_eos()
            + self._footer
        )

    def save_all(self) -> None:
        """Send every page of every block once, in PARTs, until it is told to stop.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
        """
        self.begin_parts()
        for block in self._blocks:
            if self._should_stop():
                break
            if block.is_elsewhere:
                continue
            self.send(block, np.flatnonzero(~block.present), is_zero=True)
            self.send(block, np.flatnonzero(block.present), is_zero=False)
        self.end_parts()

    def begin_parts(self) -> None:
        """Begin PART sections; pages may be sent until :meth:`end_parts`."""
        self._prefix = self._part_header()

    def end_parts(self, mark: bytes = b"") -> None:
        """End the last PART; ``mark`` stands before its end.

        Raises:
            ChannelClosed: As :meth:`save_all`.
        """
        prefix, self._prefix = self._prefix, b""
        self._send(prefix + mark + self._part_end())

    def send(
        self, block: RamBlock, pages: Pages, *, is_zero: bool, copied: Copied | None = None
    ) -> None:
        """Send pages of a block inside PARTs, in batches, until it is told to stop.

        Args:
            block: Block.
            pages: Page numbers, shape ``(n,)``.
            is_zero: Whether all of them are zero.
            copied: Their contents, if not those that the block has when they are sent.

        Raises:
            ChannelClosed: As :meth:`save_all`.
        """
        start = 0
        content, places = copied or (block.memory.view, pages)
        while start < len(pages) and not self._should_stop():
            is_record = is_zero and self._zeros is None
            count = self._allowed_zeros() if is_record else self._allowed_pages()
            batch = pages[start : start + count]
            self.note_sent(block, batch)
            self._send_batch(block, batch, is_zero, content, places[start : start + count])
            start += count

    def send_edits(
        self, block: RamBlock, pages: Pages, edits: npt.NDArray[np.uint8], sizes: Pages
    ) -> None:
        """Send pages of a block as XBZRLE edits of what the destination has of them.

        Args:
            block: Block.
            pages: Page numbers, shape ``(n,)``.
            edits: All edits, one behind the other.
            sizes: Bytes of each, shape ``(n,)``.

        Raises:
            ChannelClosed: As :meth:`save_all`.
        """
        if not len(pages):
            return
        self.note_sent(block, pages)
        prefix = self._take_prefix()
        records = xbzrle_records(pages, self._page_size, edits, sizes).tobytes()
        if block is not self._named_block:
            records = name_xbzrle_record(records, block.idstr)
            self._named_block = block
        data = prefix + records
        window_bytes = self._limiter.window_bytes or len(data)
        for start in range(0, len(data), window_bytes):
            self._throttle()
            self._send(data[start : start + window_bytes])

    def send_deflated(self, block: RamBlock, pages: Pages, deflated: Sequence[bytes]) -> None:
        """Send pages of the block that was named last, deflated one by one.

        Args:
            block: Block.
            pages: Page numbers, shape ``(n,)``.
            deflated: A zlib stream of each.

        Raises:
            ChannelClosed: As :meth:`save_all`.
        """
        assert block is self._named_block
        self.note_sent(block, pages)
        for start in range(0, len(pages), self._batch_pages):
            batch = slice(start, start + self._batch_pages)
            records = deflated_records(pages[batch], self._page_size, deflated[batch])
            data = self._take_prefix() + records
            window_bytes = self._limiter.window_bytes or len(data)
            for at in range(0, len(data), window_bytes):
                self._throttle()
                piece = data[at : at + window_bytes]
                self._channel.send(piece)
                self._account(len(piece), normal=0 if at else len(pages[batch]))

    def note_sent(self, block: RamBlock, pages: Pages) -> None:
        """The destination has these pages as they are now, or will."""
        if self._sent is not None:
            self._sent[block.idstr][pages] = True

    def _take_prefix(self) -> bytes:
        """What has to stand before the next record."""
        if self._part_limit is not None and self._part_bytes >= self._part_limit:
            self._prefix += self._part_end() + self._part_header()
        prefix, self._prefix = self._prefix, b""
        return prefix

    def _part_header(self) -> bytes:
        self._part_bytes = 0
        return encode_section_header(QEMU_VM_SECTION_PART, self._section_id)

    def _part_end(self) -> bytes:
        return encode_eos() + self._footer

    def _allowed_pages(self) -> int:
        """Pages of the next write: a whole batch, or what the rate's window can take."""
        window_bytes = self._limiter.window_bytes
        if window_bytes is None:
            return self._batch_pages
        return max(1, min(self._batch_pages, window_bytes // (self._page_size + 8)))

    def _allowed_zeros(self) -> int:
        """Zero pages of the next write, likewise."""
        window_bytes = self._limiter.window_bytes
        if window_bytes is None:
            return ZERO_BATCH_PAGES
        return max(1, min(ZERO_BATCH_PAGES, window_bytes // ZERO_RECORD_BYTES))

    def _send_batch(
        self,
        block: RamBlock,
        pages: Pages,
        is_zero: bool,
        content: npt.NDArray[np.uint8],
        places: Pages,
    ) -> None:
        self._throttle()
        prefix = self._take_prefix()
        if is_zero and self._zeros is not None:
            content, places, is_zero = self._zeros, np.arange(len(pages)), False
        named = 0
        if block is not self._named_block:
            prefix += self._name_block(block, int(pages[0]), is_zero)
            self._named_block = block
            named = 1
        if is_zero:
            records = zero_records(pages[named:], self._page_size)
            self._send(prefix + records.tobytes(), duplicate=len(pages))
            return
        if named:
            # The named record's content follows its header at once.
            begin = int(places[0]) * self._page_size
            prefix += content[begin : begin + self._page_size].tobytes()
        size = self._channel.send_pages(
            prefix,
            page_headers(pages[named:], self._page_size),
            content,
            places[named:],
            self._page_size,
        )
        self._account(size, normal=len(pages))

    def _name_block(self, block: RamBlock, page: int, is_zero: bool) -> bytes:
        header = encode_named_header(page, self._page_size, block.idstr, is_zero=is_zero)
        return header + (b"\0" if is_zero else b"")

    def _throttle(self) -> None:
        while (delay_s := self._limiter.delay_s(self._clock.monotonic_s())) > 0:
            if self._should_stop():
                return
            self._wait(delay_s)

    def _send(self, data: bytes, *, duplicate: int = 0) -> None:
        self._channel.send(data)
        self._account(len(data), duplicate=duplicate)

    def _account(self, byte_count: int, *, normal: int = 0, duplicate: int = 0) -> None:
        self._part_bytes += byte_count
        self._limiter.charge(byte_count)
        self._stats.sent(byte_count, normal=normal, duplicate=duplicate)
        self._stats.measure(self._clock.monotonic_s())


class EncodingSaver:
    """A ``ram`` handler that encodes pages in its own way; the sections are a saver's.

    Args:
        ram: Puts records on the wire.
    """

    def __init__(self, ram: RamSaver) -> None:
        self._ram = ram

    def setup_bytes(self) -> bytes:
        """START with the block list."""
        return self._ram.setup_bytes()

    def end_bytes(self) -> bytes:
        """END."""
        return self._ram.end_bytes()

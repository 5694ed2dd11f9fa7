"""multifd channels into guest memory: one thread each.

Plain pages go by one scatter read from the socket to their final place; where memory
cannot be written directly, and for compressed pages, they pass through a buffer of one
packet. The headers are the only thing that is looked at.

Reference: stream format 3.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from migrationd.codec.multifd import (
    COMPRESSED_LIMIT_BYTES,
    FIXED_BYTES,
    MULTIFD_PACKET_BYTES,
    Packet,
    PacketDecoder,
    block_name,
    carries_pages,
)
from migrationd.errors import (
    ChannelError,
    MigrationdError,
    MigrationError,
    StreamCorrupt,
    StreamTruncated,
)
from migrationd.guest.ram_block import RamBlock
from migrationd.incoming.multifd_sync import SyncPoints
from migrationd.linux.iovec import Vector, Window, address_of, run_vector
from migrationd.pageops.decompress import Decompressor, decompressor
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)


class Multifd(Protocol):
    """What the main stream's loader asks of the channels; all of it on the loading thread."""

    def flush(self) -> None:
        """A MULTIFD_FLUSH record came."""

    def end_of_body(self) -> None:
        """A body of the ``ram`` section ended."""

    def check(self) -> None:
        """Raise what a channel failed with."""


class MultifdReceiver:
    """All multifd channels of one incoming migration.

    Args:
        channels: By number; not owned.
        method: ``multifd-compression``.
    """

    def __init__(self, channels: Sequence[Channel], method: str) -> None:
        self._channels = channels
        self._method = method
        self._points = SyncPoints(len(channels))
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._is_per_section: bool | None = None
        self._has_flush = False

    def start(self, blocks: Sequence[RamBlock], page_size: int) -> None:
        """Begin to receive; the main stream has listed its blocks.

        Args:
            blocks: RAM blocks of the guest.
            page_size: Target page size in bytes.
        """
        by_name = {block.idstr: block for block in blocks}
        for number, channel in enumerate(self._channels):
            worker = _Worker(number, channel, by_name, page_size, self._method, self._points)
            thread = threading.Thread(target=worker.run, name=f"multifd-{number}", daemon=True)
            self._workers.append(worker)
            self._threads.append(thread)
            thread.start()

    def flush(self) -> None:
        """Pass the mark that a MULTIFD_FLUSH record is.

        Raises:
            MigrationdError: As :meth:`SyncPoints.pass_mark`.
        """
        self._has_flush = True
        if self._is_per_section:
            raise StreamCorrupt(
                "MULTIFD_FLUSH although each section is synchronised", section="multifd"
            )
        self._points.pass_mark()

    def end_of_body(self) -> None:
        """Pass the mark that the end of a body is, if the first one came without a flush.

        Raises:
            MigrationdError: As :meth:`SyncPoints.pass_mark`.
        """
        if self._is_per_section is None:
            self._is_per_section = not self._has_flush
        if self._is_per_section:
            self._points.pass_mark()

    def check(self) -> None:
        """Raise what a channel failed with.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        if self._points.error is not None:
            raise self._points.error

    def finish(self) -> None:
        """End after the main stream: nothing may be left on a channel.

        Raises:
            StreamCorrupt: A channel carried pages behind the last mark.
            MigrationdError: A channel failed.
        """
        more = [worker.has_more_pages() for worker in self._workers]
        self.stop()
        self.check()
        for worker, has_more in zip(self._workers, more, strict=True):
            if has_more or worker.has_unsynced_pages:
                raise StreamCorrupt("pages behind the last mark", section=worker.name)

    def stop(self) -> None:
        """Shut the channels down and wait for their threads; any number of times."""
        self._points.release()
        for channel in self._channels:
            channel.shutdown()
        for thread in self._threads:
            thread.join()


class _Worker:
    """One channel; everything but its construction happens on its thread."""

    def __init__(
        self,
        number: int,
        channel: Channel,
        blocks: Mapping[str, RamBlock],
        page_size: int,
        method: str,
        points: SyncPoints,
    ) -> None:
        self.name = f"multifd channel {number}"
        self._number = number
        self._channel = channel
        self._blocks = blocks
        self._page_size = page_size
        self._method = method
        self._points = points
        self._decoder = PacketDecoder(number, page_size, method)
        self._size = self._decoder.header_bytes
        self._header = bytearray(self._size)
        self._header_row = (address_of(np.frombuffer(self._header, np.uint8)), self._size)
        # A run and the header behind it, which nearly every packet of a large guest is.
        self._window = Window(self._header_row)
        self._has_header = False
        self._has_ended = False
        self._decompressor: Decompressor | None = decompressor(method)
        self._buffer = np.empty(0, np.uint8)
        self._last_raw = b""
        self._last_block: RamBlock | None = None
        self._last_start = 0
        self.has_unsynced_pages = False

    def run(self) -> None:
        """Receive until the input ends or something fails."""
        try:
            with self._channel.held():
                while self._packet():
                    pass
        except MigrationdError as error:
            self._points.fail(error)
        except Exception as error:  # a defect of ours must end as a failed migration
            log.error("internal error on %s", self.name, exc_info=error)
            self._points.fail(MigrationError(f"internal error on {self.name}: {error!r}"))
        finally:
            self._points.end(self._number)

    def has_more_pages(self) -> bool:
        """Whether pages lie in the socket; from any thread, where nothing should come."""
        if not self._channel.can_peek:
            return False
        try:
            head = self._channel.peek(FIXED_BYTES)
        except (BlockingIOError, ChannelError):
            return False
        return len(head) == FIXED_BYTES and carries_pages(head)

    def _packet(self) -> bool:
        """Receive one packet; False at the end of the input."""
        if not self._has_header:
            self._take_header(self._channel.recv_exactly(_vector(self._header_row), self._size))
        if self._has_ended:
            return False
        self._has_header = False
        packet = self._decoder.decode(self._header)
        if packet.normal_pages or packet.zero_pages:
            self.has_unsynced_pages = True
            self._place(packet)
        if packet.is_sync:
            if not self._points.reach(self._number):
                return False
            self.has_unsynced_pages = False
        return True

    def _take_header(self, received: int) -> None:
        self._has_header = received == self._size
        self._has_ended = not received
        if 0 < received < self._size:
            raise self._truncated(f"{received} bytes of a header of {self._size}")

    def _place(self, packet: Packet) -> None:
        block = self._block(packet)
        data = self._header
        first = self._decoder.run(data, packet, block.used_length)
        if first >= 0:
            count = packet.normal_pages
            if block.memory.view.flags.writeable:
                start = first * self._page_size
                if self._decompressor is None:
                    self._receive_run(packet, self._last_start + start)
                else:
                    content = self._decompressed(packet, block, self._decompressor)
                    block.memory.view[start : start + len(content)] = content
                block.mark_placed(slice(first, first + count))
                return
            pages = np.arange(first, first + count)
        else:
            pages = self._decoder.offsets(data, packet, block.used_length, block.idstr)
        normal, zero = pages[: packet.normal_pages], pages[packet.normal_pages :]
        if len(normal):
            self._place_normal(packet, block, normal)
        if len(zero):
            block.zero_batch(zero)

    def _place_normal(self, packet: Packet, block: RamBlock, pages: npt.NDArray[np.int64]) -> None:
        if self._decompressor is not None:
            content = self._decompressed(packet, block, self._decompressor)
            self._place_pages(block, pages, content)
        elif block.memory.view.flags.writeable:
            rows = run_vector(block.memory.view, pages, self._page_size)
            self._receive(packet, *map(tuple, rows.tolist()))
            block.mark_placed(pages)
        else:
            data = self._into_buffer(packet, MULTIFD_PACKET_BYTES)
            self._place_pages(block, pages, data)

    def _decompressed(
        self, packet: Packet, block: RamBlock, decompress: Decompressor
    ) -> npt.NDArray[np.uint8]:
        """Receive the data of a packet; returns the contents of its pages, one after the other."""
        compressed = self._into_buffer(packet, COMPRESSED_LIMIT_BYTES)
        try:
            content = decompress(compressed.data, packet.normal_pages * self._page_size)
        except ValueError as error:
            raise StreamCorrupt(
                f"packet with {self._method} data that is wrong: {error}",
                section=self.name,
                block=block.idstr,
            ) from None
        return np.frombuffer(content, np.uint8)

    def _place_pages(
        self, block: RamBlock, pages: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]
    ) -> None:
        is_run = bool((np.diff(pages) == 1).all())
        block.place_batch(pages, data.reshape(len(pages), self._page_size), is_run)

    def _block(self, packet: Packet) -> RamBlock:
        if packet.ramblock != self._last_raw or self._last_block is None:
            name = block_name(packet.ramblock)
            block = self._blocks.get(name)
            if block is None:
                raise StreamCorrupt(
                    f"a page of block {name!r}, which is not in the list", section=self.name
                )
            self._last_raw, self._last_block = packet.ramblock, block
            self._last_start = address_of(block.memory.view)
        return self._last_block

    def _into_buffer(self, packet: Packet, capacity: int) -> npt.NDArray[np.uint8]:
        if not len(self._buffer):
            self._buffer = np.empty(max(capacity, self._page_size), np.uint8)
        part = self._buffer[: packet.data_bytes]
        # Not with the next header: what is wrong with this one is told before it comes.
        self._receive(packet, (address_of(part), len(part)))
        return part

    def _receive_run(self, packet: Packet, start: int) -> None:
        """Receive the data of a packet to one place, and the next header by the same call.

        Not behind a SYNC: what follows may come only after the main stream's mark.
        """
        size = packet.data_bytes
        if packet.is_sync:
            self._receive(packet, (start, size))
            return
        self._window.aim(start, size)
        received = self._channel.recv_window(self._window, size + self._size)
        if received < size:
            raise self._truncated(f"{received} of {size} bytes of page data")
        self._take_header(received - size)

    def _receive(self, packet: Packet, *rows: tuple[int, int]) -> None:
        """Receive the data of a packet to these places, address and length each."""
        size = packet.data_bytes
        received = self._channel.recv_exactly(_vector(*rows), size)
        if received < size:
            raise self._truncated(f"{received} of {size} bytes of page data")

    def _truncated(self, what: str) -> StreamTruncated:
        return StreamTruncated(f"the channel ended after {what}", section=self.name)


def _vector(*rows: tuple[int, int]) -> Vector:
    return np.array(rows, np.uint64)

"""The channel of urgent pages: RAM records without sections around them.

    { PAGE or ZERO record }*  [EOS]

Its CONTINUE state is its own. Machine types up to 7.2 end it by EOS, later ones by closing.

Reference: stream format 6.5.
"""

from migrationd.codec.buffer import NeedData, ReadBuffer
from migrationd.codec.ram import RamDecoder
from migrationd.codec.records import MixedBatch, PageBatch, RamEos, ZeroBatch
from migrationd.errors import StreamCorrupt, StreamTruncated

_BUFFER_BYTES = 256 << 10

UrgentRecord = PageBatch | MixedBatch | ZeroBatch | RamEos


class PreemptDecoder:
    """Incremental decoder of one such channel.

    Args:
        ram: A decoder of its own that knows the blocks of the main stream.
    """

    def __init__(self, ram: RamDecoder) -> None:
        self._ram = ram
        self._buffer = ReadBuffer(_BUFFER_BYTES, 2 * _BUFFER_BYTES + 2 * ram.page_size)

    @property
    def position(self) -> int:
        """Bytes decoded so far."""
        return self._buffer.position

    def receive_view(self) -> memoryview:
        """Space for the next bytes; invalidates arrays of earlier records."""
        return self._buffer.free_view()

    def received(self, count: int) -> None:
        """Account for bytes written into :meth:`receive_view`."""
        self._buffer.added(count)

    def feed(self, data: bytes | memoryview) -> None:
        """Append a copy of ``data``; invalidates arrays of earlier records."""
        self._buffer.feed(data)

    def next_record(self) -> UrgentRecord | None:
        """Decode the next record; None when more input is needed.

        Raises:
            StreamError: The bytes contradict the format, or are no pages.
        """
        if not len(self._buffer):
            return None
        try:
            record = self._ram.decode(self._buffer)
        except NeedData:
            return None
        if isinstance(record, UrgentRecord):
            return record
        raise StreamCorrupt(
            "a record that is no page", position=self.position, section="preempt channel"
        )

    def feed_eof(self) -> None:
        """Say that the channel was closed.

        Raises:
            StreamTruncated: Inside a record.
        """
        if len(self._buffer):
            raise StreamTruncated(
                "the channel ended inside a page", position=self.position, section="preempt channel"
            )

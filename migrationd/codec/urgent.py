"""Urgent pages one by one, for a guest that waits for each of them.

The format is that of ``codec/preempt.py``, which makes rows of pages; here nothing is
gained by rows, and a page is found in a few microseconds.

Reference: stream format 2.1 and 6.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from migrationd.codec.constants import (
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_ZERO,
)
from migrationd.codec.records import RamBlockEntry
from migrationd.errors import StreamCorrupt, StreamTruncated

_SECTION = "preempt channel"
_LONGEST_HEAD = 8 + 1 + 255


@dataclass(slots=True)
class UrgentPage:
    """One page.

    Attributes:
        block: Index in the block list.
        page: Number.
        at: Where its content begins in the buffer; -1 for a zero page.
    """

    block: int
    page: int
    at: int


class UrgentDecoder:
    """Decodes one preempt channel; the caller receives into :attr:`buffer`.

    Args:
        blocks: The block list.
        page_size: Target page size in bytes.

    Attributes:
        buffer: Received bytes; pages point into it.
        is_ended: The channel's EOS came.
    """

    def __init__(self, blocks: Sequence[RamBlockEntry], page_size: int) -> None:
        self._index = {
            bytes([len(name)]) + name: (number, block.used_length)
            for number, block in enumerate(blocks)
            for name in (block.idstr.encode("latin-1"),)
        }
        self._page_size = page_size
        self._mask = page_size - 1
        self._last: tuple[int, int] | None = None
        self._end = 0
        self._position = 0
        self._at = 0
        self.buffer = bytearray(_LONGEST_HEAD + 16 * (page_size + _LONGEST_HEAD))
        self.is_ended = False

    @property
    def position(self) -> int:
        """Bytes decoded so far."""
        return self._position

    def free_view(self) -> memoryview:
        """Where the next bytes go; never empty, for a record always fits."""
        return memoryview(self.buffer)[self._end :]

    def received(self, count: int) -> list[UrgentPage]:
        """Take bytes that were put into :meth:`free_view`.

        Returns:
            Pages that are complete now; valid until :meth:`done`.

        Raises:
            StreamCorrupt: The bytes contradict the format or the block list.
        """
        self._end += count
        found: list[UrgentPage] = []
        while not self.is_ended and (page := self._next()) is not None:
            found.append(page)
        return found

    def done(self) -> None:
        """The pages were placed: their bytes may be overwritten."""
        if self._at:
            rest = self._end - self._at
            self.buffer[:rest] = self.buffer[self._at : self._end]
            self._position += self._at
            self._end, self._at = rest, 0

    def ended(self) -> None:
        """The channel was closed.

        Raises:
            StreamTruncated: Inside a record.
        """
        if self._end:
            raise StreamTruncated(
                "the channel ended inside a page", position=self.position, section=_SECTION
            )

    def _next(self) -> UrgentPage | None:
        data, begin = self.buffer, self._at
        have = self._end - begin
        if have < 8:
            return None
        word = int.from_bytes(data[begin : begin + 8], "big")
        flags = word & self._mask
        address = word & ~self._mask
        if flags == RAM_SAVE_FLAG_EOS and not address:
            self._at += 8
            self.is_ended = True
            return None
        kind = flags & ~RAM_SAVE_FLAG_CONTINUE
        if kind not in (RAM_SAVE_FLAG_PAGE, RAM_SAVE_FLAG_ZERO):
            raise self._corrupt(f"a record with flags {flags:#x}, which is no page")
        size = 8
        if flags & RAM_SAVE_FLAG_CONTINUE:
            block = self._last
            if block is None:
                raise self._corrupt("CONTINUE before any block was named")
        else:
            if have < 9:
                return None
            size = 9 + data[begin + 8]
            if have < size:
                return None
            name = bytes(data[begin + 8 : begin + size])
            block = self._index.get(name)
            if block is None:
                raise self._corrupt(
                    f"a page of block {name[1:].decode('latin-1')!r}, which is not in the list"
                )
        number, length = block
        if address >= length:
            raise self._corrupt(f"page at {address:#x} is outside the block of {length:#x} bytes")
        at = begin + size
        size += self._page_size if kind == RAM_SAVE_FLAG_PAGE else 1
        if have < size:
            return None
        if kind == RAM_SAVE_FLAG_ZERO:
            if data[at]:
                raise self._corrupt(f"a page filled with byte {data[at]:#04x} is not taken")
            at = -1
        self._last = block
        self._at += size
        return UrgentPage(number, address // self._page_size, at)

    def _corrupt(self, message: str) -> StreamCorrupt:
        return StreamCorrupt(message, position=self._position + self._at, section=_SECTION)

"""Rows of page records: the decoder's hot path.

A PAGE|CONTINUE record has a fixed length whatever its address is, and so has
ZERO|CONTINUE. A row of equal records is therefore found and checked as one array,
without a copy. Where kinds alternate, a plain loop from record to record is faster: a
NumPy call costs a microsecond, a step of the loop a fifth. A probe some records ahead
chooses.

Reference: stream format 2.1.
"""

import struct

import numpy as np
import numpy.typing as npt

from migrationd.codec.buffer import NeedData
from migrationd.codec.constants import (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
)
from migrationd.codec.records import MixedBatch, PageBatch, PageNumbers, XbzrleBatch, ZeroBatch

PAGE_CONTINUE = RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE
ZERO_CONTINUE = RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE

XBZRLE_CONTINUE = RAM_SAVE_FLAG_XBZRLE | RAM_SAVE_FLAG_CONTINUE

EDIT_RECORDS = 4096
"""Most XBZRLE records of one batch: 16 MiB of pages."""

EDIT_BYTES = 512 << 10
"""A batch ends when its records are longer than this: decoding takes many times their size."""

ZERO_BYTES = 9
"""Length of a ZERO|CONTINUE record."""

PROBE_RECORDS = 31
"""If the record so far ahead, or the last one here, is of the same kind, arrays are worth it."""

LEAST_RECORDS = 4
"""Fewer records than this are never worth arrays."""

RUN_RECORDS = 64
"""Consecutive pages are cut out of a longer row from this many on."""

FIRST_RECORDS = 256
"""A row is looked at this far first, and further only if it goes on."""

MOST_RECORDS = 8192
"""Most records of one batch."""

LOOP_RECORDS = 256
"""Most records that the plain loop collects before the next probe."""

_WORD = np.dtype(">u8")
_unpack_word = struct.Struct(">Q").unpack_from
_unpack_edit = struct.Struct(">QBH").unpack_from
_EDIT_HEAD_BYTES = 11

Batch = PageBatch | ZeroBatch | MixedBatch


class OutsideBlockError(Exception):
    """A page lies outside its block.

    Attributes:
        at: Index in the input of the record.
        address: Its byte offset in the block; 2^63 and more may be negative.
    """

    def __init__(self, at: int, address: int) -> None:
        super().__init__(at, address)
        self.at = at
        self.address = address


class RowReader:
    """Reads rows of PAGE|CONTINUE and ZERO|CONTINUE records.

    Args:
        page_size: Target page size in bytes, a power of two of at least 1024.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_bits = page_size.bit_length() - 1
        self._mask = page_size - 1
        self._numbers: PageNumbers = np.arange(MOST_RECORDS, dtype=np.int64)
        self._steps: PageNumbers = self._numbers * page_size

    def read(
        self, data: bytearray, start: int, end: int, *, block: int, limit: int
    ) -> tuple[Batch, int]:
        """Read the row that begins with a PAGE|CONTINUE or ZERO|CONTINUE record.

        Args:
            data: Input.
            start: Index of the record.
            end: Index behind the last byte that arrived.
            block: Index of the block, for the batch.
            limit: Length of the block in bytes.

        Returns:
            One batch, in the order of the stream, and the number of input bytes it covers.

        Raises:
            NeedData: The first record is not complete.
            OutsideBlockError: A page lies outside the block.
        """
        kind = data[start + 7]
        stride = self._page_size + 8 if kind == PAGE_CONTINUE else ZERO_BYTES
        available = (end - start) // stride
        if not available:
            raise NeedData
        ahead = min(PROBE_RECORDS, available - 1)
        if ahead >= LEAST_RECORDS and data[start + ahead * stride + 7] == kind:
            batch = self._row(data, start, min(available, FIRST_RECORDS), kind, block, limit)
            if len(batch.pages) == FIRST_RECORDS < available:
                batch = self._row(data, start, min(available, MOST_RECORDS), kind, block, limit)
            if 2 * len(batch.pages) > ahead:
                return batch, len(batch.pages) * stride
        return self._walk(data, start, end, block, limit)

    def read_edits(
        self, data: bytearray, start: int, end: int, *, block: int, limit: int
    ) -> XbzrleBatch | None:
        """Read the complete and valid XBZRLE|CONTINUE records at ``start``.

        Args:
            data: As for :meth:`read`, like the others.
            start: Index of the first record.
            end: Index behind the last byte that arrived.
            block: Index of the block, for the batch.
            limit: Length of the block in bytes.

        Returns:
            The row; None if there are not two of them, whatever the reason.
        """
        mask, page_size = self._mask, self._page_size
        words: list[int] = []
        ends: list[int] = []
        at, last = start, min(end - _EDIT_HEAD_BYTES, start + EDIT_BYTES)
        while at <= last and len(words) < EDIT_RECORDS:
            word, encoding, size = _unpack_edit(data, at)
            at += _EDIT_HEAD_BYTES + size
            is_valid = encoding == ENCODING_FLAG_XBZRLE and 0 < size <= page_size
            if word & mask != XBZRLE_CONTINUE or word >= limit or not is_valid or at > end:
                break
            words.append(word)
            ends.append(at)
        if len(words) < 2:
            return None
        behind = np.array(ends, np.int64)
        begins = np.concatenate(([start], behind[:-1])) + _EDIT_HEAD_BYTES
        return XbzrleBatch(
            block, np.array(words, np.int64) >> self._page_bits, begins, behind, data
        )

    def _row(
        self, data: bytearray, start: int, available: int, kind: int, block: int, limit: int
    ) -> PageBatch | ZeroBatch:
        """The records at ``start`` that are equal in kind, as one batch."""
        page_size = self._page_size
        stride = page_size + 8 if kind == PAGE_CONTINUE else ZERO_BYTES
        words = np.ndarray((available,), _WORD, data, start, (stride,)).astype(np.int64)
        first = int(words[0])
        # Most rows are consecutive pages: one comparison checks kinds and addresses.
        count = _true_prefix(words == self._steps[:available] + first)
        is_run = count >= RUN_RECORDS or count == available
        if not is_run:
            same_kind = _true_prefix((words & self._mask) == kind)
            is_run = same_kind == count
            count = same_kind
        if kind == ZERO_CONTINUE:
            fills = np.ndarray((count,), np.uint8, data, start + 8, (stride,))
            if fills.any():
                count = _true_prefix(fills == fills[0])
        if is_run:
            lowest, highest = first, first + (count - 1) * page_size
            pages = self._numbers[:count] + (first >> self._page_bits)
        else:
            words = words[:count]
            lowest, highest = int(words.min()), int(words.max())
            pages = words >> self._page_bits
        if lowest < 0 or highest >= limit:
            index = _true_prefix((pages >= 0) & (pages < limit >> self._page_bits))
            raise OutsideBlockError(start + index * stride, int(pages[index]) << self._page_bits)
        if kind == ZERO_CONTINUE:
            return ZeroBatch(block, pages, data[start + 8], True)
        content = np.ndarray((count, page_size), np.uint8, data, start + 8, (stride, 1))
        return PageBatch(block, pages, content, is_run, True)

    def _walk(
        self, data: bytearray, start: int, end: int, block: int, limit: int
    ) -> tuple[Batch, int]:
        """Records of both kinds, collected one by one."""
        page_bits = self._page_bits
        mask = self._mask
        page_bytes = self._page_size + 8
        last_page = end - page_bytes
        last_zero = end - ZERO_BYTES
        pages: list[int] = []
        content_at: list[int] = []
        at = start
        for _ in range(LOOP_RECORDS):
            if at > last_zero:
                break
            word = _unpack_word(data, at)[0]
            kind = word & mask
            if word >= limit and kind in (PAGE_CONTINUE, ZERO_CONTINUE):
                raise OutsideBlockError(at, word & ~mask)
            if kind == PAGE_CONTINUE and at <= last_page:
                content_at.append(at + 8)
                at += page_bytes
            elif kind == ZERO_CONTINUE and not data[at + 8]:
                content_at.append(-1)
                at += ZERO_BYTES
            else:
                break
            pages.append(word >> page_bits)
        if not pages:
            # A fill byte other than 0; what is incomplete was found before.
            return self._row(data, start, 1, ZERO_CONTINUE, block, limit), ZERO_BYTES
        return self._collected(data, block, pages, content_at), at - start

    def _collected(
        self, data: bytearray, block: int, pages: list[int], content_at: list[int]
    ) -> Batch:
        count = len(pages)
        if max(content_at) < 0:
            return ZeroBatch(block, np.array(pages, np.int64), 0, True)
        if min(content_at) < 0:
            return MixedBatch(block, pages, content_at, data)
        shape, strides = (count, self._page_size), (self._page_size + 8, 1)
        content = np.ndarray(shape, np.uint8, data, content_at[0], strides)
        is_run = pages == list(range(pages[0], pages[0] + count))
        return PageBatch(block, np.array(pages, np.int64), content, is_run, True)


def _true_prefix(flags: npt.NDArray[np.bool_]) -> int:
    """How many of the first elements are true; shape ``(n,)``, n at least 1."""
    index = int(flags.argmin())
    return len(flags) if flags[index] else index

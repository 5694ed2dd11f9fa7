"""Pages straight from the socket into guest memory.

In a long run of consecutive pages the next bytes are known before they come: header,
page, header, page. They are received by one scatter read, the pages to their final
place. The headers are checked afterwards; if the stream went on differently, the bytes
are put back in order and given to the decoder, and the memory is made zero again. Only
pages that hold nothing yet are received so, for nothing can be lost there.

Reference: PAGE|CONTINUE records, stream format 2.1.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migrationd.codec.constants import RAM_SAVE_FLAG_CONTINUE, RAM_SAVE_FLAG_PAGE
from migrationd.codec.stream import StreamDecoder
from migrationd.guest.memory import AnonymousMemory, Bytes
from migrationd.guest.ram_block import RamBlock
from migrationd.linux.iovec import IOV_MAX, Vector, address_of, page_vector
from migrationd.transport.channel import Channel

WINDOW_PAGES = IOV_MAX // 2 - 1
"""Pages of one scatter read, each behind its header: what the kernel takes in one call."""

LEAST_PAGES = 32
"""A shorter window is not worth its vector."""

LEAST_RUN_PAGES = 512
"""A run is guessed to go on after this many pages: a wrong guess costs as much as 64 pages."""

LEAST_USUAL_PAGES = 96
"""A run is guessed to become as long as the one before, if that had this many pages."""

GATHER_BYTES = 4 << 20
"""A read waits a moment for so much: a whole window of small pages. To wake for an eighth of
that costs a third more processor time, and a peer whose connection is paced a sixth of its rate."""

_HEADER_BYTES = 8
_PAGE_CONTINUE = RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE

Rows = npt.NDArray[np.uint8]


class RunGuess:
    """How far the run of pages that a stream is in goes on, by what it did so far.

    Memory comes in patterns: what was long before is guessed to be as long again.

    Attributes:
        next: Block and page that the run goes on with; None outside a run.
    """

    def __init__(self) -> None:
        self.next: tuple[RamBlock, int] | None = None
        self._pages = 0
        self._usual_pages = 0
        self._is_open = False

    def saw(self, block: RamBlock, first_page: int, count: int) -> None:
        """Consecutive pages came."""
        if self.next != (block, first_page):
            self.ended()
        self._pages += count
        self.next = block, first_page + count
        self._is_open = True

    def saw_mixed(self, block: RamBlock, pages: Sequence[int], content_at: Sequence[int]) -> None:
        """A row of full and zero pages came: it may end a run, and begin one."""
        count = len(pages)
        lead = 0
        while lead < count and content_at[lead] >= 0 and pages[lead] == pages[0] + lead:
            lead += 1
        if lead:
            self.saw(block, pages[0], lead)
        tail = 0
        while tail < count - lead and (
            content_at[-1 - tail] >= 0 and pages[-1 - tail] == pages[-1] - tail
        ):
            tail += 1
        if lead < count:
            self.ended()
        if tail:
            self.saw(block, pages[-tail], tail)

    def ended(self) -> None:
        """The run is over."""
        if self._pages:
            self._usual_pages = self._pages
        self._pages = 0
        self.next = None
        self._is_open = False

    def interrupted(self) -> None:
        """Something else came; the run may go on behind it."""
        self._is_open = False

    @property
    def is_between(self) -> bool:
        """Whether a run of the usual length is just over, and the next is likely to be as long."""
        return LEAST_USUAL_PAGES <= self._usual_pages == self._pages

    def pages_ahead(self) -> int:
        """How many pages of the run are guessed to come next."""
        if not self._is_open:
            return 0
        if self._pages < self._usual_pages and self._usual_pages >= LEAST_USUAL_PAGES:
            return self._usual_pages - self._pages
        return WINDOW_PAGES if self._pages >= LEAST_RUN_PAGES else 0


class DirectReceiver:
    """Receives runs of pages of one stream; used by its loading thread.

    The decoder must be between records, or wait inside one of at most a page.

    Args:
        channel: A socket.
        decoder: The stream's decoder, which waits for more input in a run.
        timeout_s: Longest wait for bytes.
    """

    def __init__(self, channel: Channel, decoder: StreamDecoder, timeout_s: float) -> None:
        self._channel = channel
        self._decoder = decoder
        self._timeout_s = timeout_s
        self._size = 0
        self._headers: Rows
        self._steps: npt.NDArray[np.uint64]
        self._vector: Vector

    def window(self, block: RamBlock, first_page: int, most: int) -> int:
        """Pages from ``first_page``, at most so many, that may be received directly.

        Returns:
            0 if there are too few.
        """
        if not self._channel.is_socket or not isinstance(block.memory, AnonymousMemory):
            return 0
        present = block.present[first_page : first_page + min(most, WINDOW_PAGES)]
        taken = np.flatnonzero(present)
        count = int(taken[0]) if len(taken) else len(present)
        return count if count >= LEAST_PAGES else 0

    def receive(self, block: RamBlock, first_page: int, count: int) -> tuple[int, int]:
        """Receive a window; everything that fits the run is placed, the rest is decoded.

        Args:
            block: Block of the run.
            first_page: Page that the run goes on with.
            count: From :meth:`window`.

        Returns:
            Pages placed, and bytes received. Fewer pages than asked for: the run ended, or
            the input did or paused, and the decoder has what came behind it.

        Raises:
            ChannelClosed: The channel was shut down or broke.
        """
        size = block.page_size
        if size != self._size:
            self._prepare(size)
        start = first_page * size
        target = block.memory.view[start : start + count * size]
        expected = (self._steps[:count] + np.uint64(start | _PAGE_CONTINUE)).astype(">u8")
        pending = self._decoder.pending()
        if pending[:_HEADER_BYTES] != expected[:1].tobytes()[: len(pending)]:
            return 0, 0
        self._vector[1 : 2 * count : 2, 0] = self._steps[:count] + np.uint64(address_of(target))
        _scatter(pending, self._headers, target, size)
        try:
            total = self._read(len(pending), expected)
        finally:
            self._channel.gather_no_more()
        complete = total // (_HEADER_BYTES + size)
        wrong = np.flatnonzero(self._headers[:complete].view(">u8")[:, 0] != expected[:complete])
        good = int(wrong[0]) if len(wrong) else complete
        used = good * (_HEADER_BYTES + size)
        self._decoder.pass_over(used)
        block.mark_placed(slice(first_page, first_page + good))
        if total > used:
            content = target.reshape(count, size)[good:]
            self._decoder.feed(_gather(self._headers[good:], content, total - used))
            content[: complete - good + 1] = 0
        return good, total - len(pending)

    def _prepare(self, size: int) -> None:
        """Make what is the same for every window of this page size."""
        self._size = size
        self._headers = np.zeros((WINDOW_PAGES, _HEADER_BYTES), np.uint8)
        self._steps = np.arange(WINDOW_PAGES, dtype=np.uint64) * np.uint64(size)
        self._vector = page_vector(
            self._headers,
            np.zeros(size, np.uint8),
            np.zeros(WINDOW_PAGES, np.int64),
            size,
        )

    def _read(self, total: int, expected: npt.NDArray[np.uint64]) -> int:
        """Fill the window until a header differs; returns the bytes there, with those that were.

        Not a byte more is waited for then: what came instead may be the last of the stream.
        """
        record_bytes = _HEADER_BYTES + self._size
        count = len(expected)
        end = count * record_bytes
        comes_fast = True
        vector = self._vector[: 2 * count]
        words = self._headers.view(">u8")[:, 0]
        checked = 0
        while total < end:
            record, inside = divmod(total, record_bytes)
            first = 2 * record + (inside >= _HEADER_BYTES)
            done_of_first = inside - _HEADER_BYTES if inside >= _HEADER_BYTES else inside
            saved = vector[first].copy()
            vector[first, 0] += np.uint64(done_of_first)
            vector[first, 1] -= np.uint64(done_of_first)
            try:
                comes_fast = comes_fast and self._channel.gather(min(end - total, GATHER_BYTES))
                done = self._channel.recv_vector(vector[first:], self._timeout_s)
            except TimeoutError:
                break
            finally:
                vector[first] = saved
            if not done:
                break
            total += done
            arrived = (total + self._size) // record_bytes
            if not np.array_equal(words[checked:arrived], expected[checked:arrived]):
                break
            checked = arrived
        return total


def _scatter(data: bytes, headers: Rows, target: Bytes, size: int) -> None:
    """Put the beginning of the first record where a read would have put it."""
    head = data[:_HEADER_BYTES]
    headers.reshape(-1)[: len(head)] = np.frombuffer(head, np.uint8)
    body = data[_HEADER_BYTES : _HEADER_BYTES + size]
    target[: len(body)] = np.frombuffer(body, np.uint8)


def _gather(headers: Rows, content: Rows, length: int) -> bytes:
    """The received bytes in the order of the stream."""
    records = -(-length // (headers.shape[1] + content.shape[1]))
    return np.concatenate((headers[:records], content[:records]), axis=1).tobytes()[:length]

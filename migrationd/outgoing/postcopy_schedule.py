"""Which page goes next in postcopy, and who sends it.

A page may travel once only: a destination refuses the second copy of a page that it has
placed. One test-and-set bitmap per block therefore decides between the background push and
the answers to requests, whatever channel each of them uses.

Zero pages are not pushed: a page that never came reads as zero once the destination has all
others. They are answered when they are asked for, and those that were asked for last time go
first, as runs.

Reference: the host page rule, stream format 2.3; requests, 5.3.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from migrationd.outgoing.postcopy_walks import Walk, Walks

Pages = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_SCAN_PAGES = 4096
_WALKED_AT_ONCE = 8
_FEW_PAGES = 1 << 16
_ONES = b"\1" * 4096
_SCAN_PAGES_MAX = 1 << 20


@dataclass(slots=True)
class BlockPages:
    """Pages of one RAM block.

    Attributes:
        idstr: Name.
        present: One bool per target page; others are zero pages. Not changed here.
        host_pages: Target pages of one host page; requests and sends are whole host pages.
        sent: One bool per target page: it is on its way, or the destination has it.
        wanted: Pages that must be sent: those of host pages that hold something.
        taken: The bytes of ``sent``: for a few pages it is faster.
        remaining: Wanted pages that are not sent.
        led: Pages that went ahead of the package because they are asked for first; zero
            pages among them are worth a range of their own. None: no page did.
    """

    idstr: str
    present: Bools
    host_pages: int = 1
    sent: Bools = field(init=False)
    taken: memoryview = field(init=False)
    wanted: Bools = field(init=False)
    remaining: int = field(init=False)
    led: Bools | None = None

    def __post_init__(self) -> None:
        self.sent = np.zeros(len(self.present), np.bool_)
        self.taken = self.sent.data.cast("B")
        self.recount()

    def recount(self) -> None:
        """Find what must be sent after ``present`` or ``sent`` was changed from outside."""
        self.wanted = self.present
        if self.host_pages > 1:
            whole = self.present.reshape(-1, self.host_pages).any(axis=1)
            self.wanted = np.repeat(whole, self.host_pages)
        self.remaining = int(np.count_nonzero(self.wanted & ~self.sent))


@dataclass(slots=True, eq=False)
class Batch:
    """Pages of one block for the background push; none of them is claimed yet.

    Attributes:
        block: Index of the block.
        pages: Target page numbers, shape ``(n,)``; whole host pages.
        is_zero: Whether all of them are zero pages.
        is_wanted: Whether all of them are wanted pages.
        is_first: Whether it goes before everything else; a restart does not break it off.
        is_learned: Whether the guest asked for these pages the last time.
        walk: The walk that it belongs to.
        done: How many of its pages the push has dealt with.
    """

    block: int
    pages: Pages
    is_zero: bool = False
    is_wanted: bool = False
    is_first: bool = False
    is_learned: bool = False
    walk: Walk | None = None
    done: int = 0


class PageSchedule:
    """The order of the background push, and the claim to every page.

    One thread takes batches; any thread claims and asks for a restart.

    Args:
        blocks: RAM blocks in the order of the block list.

    Attributes:
        strays: Answered requests that belong to no walk so far.
    """

    def __init__(self, blocks: Sequence[BlockPages]) -> None:
        self.strays = 0
        self.blocks = tuple(blocks)
        self._lock = threading.Lock()
        self._block = 0
        self._page = 0
        self._walks = Walks()
        self._turns: deque[Walk] = deque(maxlen=_WALKED_AT_ONCE)
        self._walked: list[Walk] = []
        self._first: list[Batch] = []
        self._broken_off: Batch | None = None

    @property
    def remaining_pages(self) -> int:
        """Pages that must still be sent."""
        return sum(block.remaining for block in self.blocks)

    @property
    def has_restart(self) -> bool:
        """Whether the next batch begins elsewhere."""
        return bool(self._turns)

    def push_first(self, batches: Iterable[Batch]) -> None:
        """Put batches before everything else, in this order."""
        self._first = list(batches)[::-1]

    def recount(self) -> None:
        """Count again what remains, after ``sent`` was filled in before postcopy began."""
        with self._lock:
            for state in self.blocks:
                state.recount()

    def discards(self, block: int) -> Pages:
        """What the destination must forget before it listens, as runs.

        A page that was not sent may be in the destination's memory all the same, inside a
        huge page; it would never be asked for. Runs end at pages that hold something and were
        sent; zero pages between them count as not sent afterwards.

        Returns:
            Shape ``(n, 2)``: first page, count; host page aligned.
        """
        state = self.blocks[block]
        count = len(state.sent)
        if not state.sent.any():
            return np.array([[0, count]], np.int64) if count else np.empty((0, 2), np.int64)
        if state.led is not None and state.host_pages == 1:
            found = np.flatnonzero(state.sent)
            if len(found) <= _FEW_PAGES:
                return self._discards_around(state, state.led, found)
        kept = state.sent & (state.wanted if state.led is None else state.wanted | state.led)
        if state.host_pages > 1:
            # A host page of which a part was not sent goes as a whole.
            rows = kept.reshape(-1, state.host_pages)
            kept = np.repeat(np.all(rows, axis=1), state.host_pages)
        edges = np.flatnonzero(kept[1:] != kept[:-1]) + 1
        bounds = np.concatenate(([0], edges, [count]))[int(kept[0]) :]
        firsts, ends = bounds[:-1:2], bounds[1::2]
        # Of each run between kept pages and the kept ones behind it, which want nothing.
        is_needed = np.logical_or.reduceat(state.wanted & ~kept, firsts)
        runs = np.stack((firsts[is_needed], (ends - firsts)[is_needed]), axis=1)
        is_forgotten = np.zeros(count + 1, np.int8)
        is_forgotten[runs[:, 0]] = 1
        is_forgotten[runs.sum(axis=1)] -= 1
        np.cumsum(is_forgotten, out=is_forgotten)
        with self._lock:
            state.sent &= ~is_forgotten[:-1].view(np.bool_)
            state.remaining = int(np.count_nonzero(state.wanted & ~state.sent))
        return runs

    def _discards_around(self, state: BlockPages, led: Bools, found: Pages) -> Pages:
        """The same where few pages were sent, whatever the block's size."""
        is_kept = state.wanted[found] | led[found]
        kept = found[is_kept]
        firsts = np.concatenate(([0], kept + 1))
        counts = np.concatenate((kept, [len(state.sent)])) - firsts
        with self._lock:
            state.sent[found[~is_kept]] = False
            state.remaining = int(
                np.count_nonzero(state.wanted) - np.count_nonzero(state.wanted[kept])
            )
        return np.stack((firsts, counts), axis=1)[counts > 0]

    def adopt_received(self, block: int, received: Bools) -> None:
        """Believe the destination about what it has: after a pause only its word counts."""
        state = self.blocks[block]
        with self._lock:
            state.sent[:] = received
            state.remaining = int(np.count_nonzero(state.wanted & ~state.sent))
        self._block = self._page = 0
        self._broken_off = None
        self._turns.clear()
        self._walked.clear()
        self._walks = Walks()

    def claim_run(self, block: int, first: int, count: int) -> bool:
        """Claim consecutive pages that were found wanted; False, and none, if one is taken."""
        state = self.blocks[block]
        taken = state.taken
        with self._lock:
            if taken[first : first + count].tobytes().count(1):
                return False
            taken[first : first + count] = _ONES[:count]
            state.remaining -= count
        return True

    def claim(self, block: int, pages: Pages) -> Pages:
        """Claim pages for sending.

        Returns:
            Those that nobody has claimed before, in order.
        """
        state = self.blocks[block]
        with self._lock:
            taken = state.sent[pages]
            if taken.any():
                pages = pages[~taken]
            state.sent[pages] = True
            if state.remaining:
                state.remaining -= int(np.count_nonzero(state.wanted[pages]))
        return pages

    def claim_page(self, block: int, page: int) -> bool:
        """Claim one page; False if somebody has it already."""
        state = self.blocks[block]
        with self._lock:
            if state.taken[page]:
                return False
            state.taken[page] = 1
            if state.wanted[page]:
                state.remaining -= 1
        return True

    def requested(self, block: int, first: int, count: int) -> tuple[int, int, int] | None:
        """Let the push go where requests go; called by one thread.

        Args:
            block: Index of the block.
            first: First page of a request that was answered.
            count: Its pages.

        Returns:
            Pages that the guest has passed on its way there: first page, count, step.
        """
        walk = self._walks.follow(block, first, count)
        if walk is not None:
            self.strays += not walk.is_sure
            self._turns.append(walk)
        return self._walks.passed

    def broken_off(self, batch: Batch) -> None:
        """Take back what of a batch was not sent; called by the thread that takes batches."""
        if batch.done == len(batch.pages):
            return
        if batch.walk is None:
            self._broken_off = batch
            return
        page = int(batch.pages[batch.done])
        batch.walk.left += abs(batch.walk.cursor - page)
        batch.walk.cursor = page

    def next_batch(self, limit: int) -> Batch | None:
        """The next pages of the background push.

        Args:
            limit: Most pages; rounded up to a whole host page.

        Returns:
            None when every page that must be sent is claimed.
        """
        while self._first:
            first = self._first.pop()
            pages = first.pages[~self.blocks[first.block].sent[first.pages]]
            if len(pages) > limit:
                self._first.append(Batch(first.block, pages[limit:], first.is_zero))
                pages = pages[:limit]
            if len(pages):
                return Batch(first.block, pages, first.is_zero, is_first=True, is_learned=True)
        while self._turns:
            self._walked = [*self._walked[1 - _WALKED_AT_ONCE :], self._turns.popleft()]
        while self._walked:
            walk = self._walked[-1]
            found = self._scan_walk(walk, limit)
            if found is not None:
                return Batch(walk.block, found, is_wanted=True, walk=walk)
            self._walked.pop()
        batch, self._broken_off = self._broken_off, None
        if batch is not None:
            return batch  # its gather vector is made already
        while any(block.remaining for block in self.blocks):
            state = self.blocks[self._block]
            found = self._scan(state, limit) if state.remaining else None
            if found is not None:
                return Batch(self._block, found, is_wanted=True)
            self._block = (self._block + 1) % len(self.blocks)
            self._page = 0
        return None

    def zero_batches(self, limit: int) -> Iterator[Batch]:
        """Zero pages that nobody has claimed, for when all others are."""
        for index, state in enumerate(self.blocks):
            for begin in range(0, len(state.sent), _SCAN_PAGES_MAX):
                found = np.flatnonzero(~state.sent[begin : begin + _SCAN_PAGES_MAX]) + begin
                for start in range(0, len(found), limit):
                    yield Batch(index, found[start : start + limit], is_zero=True, is_first=True)

    def _scan_walk(self, walk: Walk, limit: int) -> Pages | None:
        """Wanted pages ahead of a walk, in its direction; None at its end."""
        state = self.blocks[walk.block]
        whole = state.host_pages
        limit = -(-limit // whole) * whole
        while walk.left > 0 and state.remaining and 0 <= walk.cursor < len(state.sent):
            span = min(max(limit, whole), walk.left, _SCAN_PAGES)
            if walk.step > 0:
                begin = walk.cursor // whole * whole
                end = min(begin + -(-span // whole) * whole, len(state.sent))
                walk.cursor = end
            else:
                end = (walk.cursor // whole + 1) * whole
                begin = max(end - -(-span // whole) * whole, 0)
                walk.cursor = begin - 1
            walk.left -= end - begin
            found = np.flatnonzero(state.wanted[begin:end] & ~state.sent[begin:end]) + begin
            if len(found):
                return found if walk.step > 0 or whole > 1 else found[::-1].copy()
        return None

    def _scan(self, state: BlockPages, limit: int) -> Pages | None:
        """Wanted pages from the cursor on; None if there are none up to the block's end."""
        step = _SCAN_PAGES
        limit = -(-limit // state.host_pages) * state.host_pages
        while self._page < len(state.sent):
            # Host pages are scanned whole: they are claimed whole.
            begin = self._page // state.host_pages * state.host_pages
            end = begin + -(-step // state.host_pages) * state.host_pages
            found = np.flatnonzero(state.wanted[begin:end] & ~state.sent[begin:end])
            if len(found):
                pages = found[:limit] + begin
                self._page = int(pages[-1]) + 1
                return pages
            self._page = end
            step = min(step * 4, _SCAN_PAGES_MAX)
        return None

"""Where a guest's requests are going, so that the push goes there first.

Processors walk: a request soon after one for the page next to it says in which direction,
and that what lies ahead will be wanted. A single request says little; its neighbours go
next, and then the push returns to where it was.
"""

from dataclasses import dataclass

NEIGHBOUR_PAGES = 32
"""What follows a request that belongs to no walk."""

_AHEAD_PAGES = 64
_AHEAD_MAX = 1 << 40
_REACH_PAGES = 1024
"""A walk may have passed over so many pages that were there already."""

_WALKS = 16
_SURE_HITS = 2
_UNDER_WAY_PAGES = 512


@dataclass(slots=True, eq=False)
class Walk:
    """One walk through a block; changed by the thread that takes requests.

    Attributes:
        block: Index of the block.
        last: Page of its last request.
        step: 1 upwards, -1 downwards.
        hits: Requests that confirmed the direction.
        cursor: Page that the push looks at next; moved by the push alone.
        left: Pages from the cursor on that go before the rest.
    """

    block: int
    last: int
    step: int
    hits: int
    cursor: int
    left: int

    @property
    def is_sure(self) -> bool:
        """Whether what lies ahead will be asked for."""
        return self.hits >= _SURE_HITS


class Walks:
    """The walks that requests belong to; used by one thread.

    Attributes:
        passed: Pages between the last request and the one before it on the same walk, which
            were there when the guest came by: first page, count, step. None: it is on no walk.
    """

    def __init__(self) -> None:
        self._walks: list[Walk] = []
        self.passed: tuple[int, int, int] | None = None

    def follow(self, block: int, first: int, count: int) -> Walk | None:
        """Take a request.

        Args:
            block: Index of the block.
            first: First page.
            count: Pages.

        Returns:
            The walk that the push is to follow from here on; None if it does already.
        """
        known = self._find(block, first, count)
        self.passed = None
        if known is None:
            walk = Walk(block, first, 1, 0, first + count, NEIGHBOUR_PAGES)
            self._walks = [walk, *self._walks[: _WALKS - 1]]
            return walk
        step = 1 if first >= known.last else -1
        hits = known.hits + 1 if step == known.step or not known.hits else 0
        if hits >= _SURE_HITS and (between := abs(first - known.last) - 1) > 0:
            self.passed = known.last + step, between, step
        known.last = first
        ahead = (known.cursor - first) * step
        ahead_pages = _AHEAD_PAGES << 2 * hits if hits < 8 else _AHEAD_MAX
        if step == known.step and 0 < ahead <= _UNDER_WAY_PAGES and known.left > ahead_pages // 2:
            known.hits = hits
            return None
        walk = Walk(block, first, step, hits, first + count if step > 0 else first - 1, ahead_pages)
        known.left = 0
        self._walks[self._walks.index(known)] = walk
        return walk

    def _find(self, block: int, first: int, count: int) -> Walk | None:
        reach = max(_REACH_PAGES, 2 * count)
        found = None
        for walk in self._walks:
            distance = abs(first - walk.last)
            if walk.block == block and distance <= reach:
                found, reach = walk, distance
        return found

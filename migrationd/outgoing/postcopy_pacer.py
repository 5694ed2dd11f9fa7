"""``max-postcopy-bandwidth``: even spacing, so that what is urgent never waits behind a burst."""

from dataclasses import dataclass

_CATCH_UP_S = 0.01
_LONGEST_WAIT_S = 0.1
"""The rate may change while somebody waits."""
_WRITE_S = 0.01
_WRITE_BYTES = 128 << 10
_LARGE_WRITE_S = 0.0005


class Pacer:
    """Spaces the background push; pure, the time is handed in.

    One thread charges and asks; the rate may be set from another at any time.

    Args:
        bytes_per_s: The limit; 0 is unlimited.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._due_s = 0.0

    def set_rate(self, bytes_per_s: int) -> None:
        """Change the limit at once; what was sent under the old one is forgotten."""
        if bytes_per_s != self._rate:
            self._rate, self._due_s = bytes_per_s, 0.0

    def most_bytes(self) -> int | None:
        """Most bytes of one write; None without a limit.

        The next look at the limit is soon, and what is urgent does not wait for a large piece
        on a channel that is idle most of the time.
        """
        if not self._rate:
            return None
        return int(min(self._rate * _WRITE_S, max(_WRITE_BYTES, self._rate * _LARGE_WRITE_S)))

    def charge(self, byte_count: int, now_s: float) -> None:
        """Account for bytes that were sent."""
        if self._rate:
            self._due_s = max(self._due_s, now_s - _CATCH_UP_S) + byte_count / self._rate

    def delay_s(self, now_s: float) -> float:
        """Seconds after which to ask again; 0 when bytes may be sent now."""
        if not self._rate:
            self._due_s = 0.0
            return 0.0
        return min(max(0.0, self._due_s - now_s), _LONGEST_WAIT_S)


_BUSY_S = 0.01


@dataclass(frozen=True, slots=True)
class Pace:
    """How the push shares a channel.

    Attributes:
        window_pages: Pages of one write: a request on the same channel waits for one.
        queue_bytes: What may lie in the kernel, before a request on the same channel.
        unread_bytes: What may lie in the kernels of both ends, where that can be told; 0 is
            unlimited.
    """

    window_pages: int
    queue_bytes: int
    unread_bytes: int = 0


ALONE = Pace(window_pages=128, queue_bytes=256 << 10, unread_bytes=1 << 20)
"""Nobody asks, or for what comes anyway: both ends are woken less often for large pieces. The
first request after a while waits for half a millisecond."""

SHARED = Pace(window_pages=8, queue_bytes=32 << 10, unread_bytes=160 << 10)
"""Requests are answered on the same channel: what is before them is short."""

BESIDE = Pace(window_pages=32, queue_bytes=128 << 10)
"""Requests have a channel of their own. They wait for pages that are under way here only."""

ALONE_BESIDE = Pace(window_pages=256, queue_bytes=256 << 10)
"""Nobody asks, and who will has a channel of their own."""


class Shares:
    """Chooses the pace; pure, the time is handed in.

    Args:
        has_own_channel: Whether requests are answered on a channel of their own.
    """

    def __init__(self, *, has_own_channel: bool) -> None:
        self._busy = BESIDE if has_own_channel else SHARED
        self._alone = ALONE_BESIDE if has_own_channel else ALONE
        self._first_pages = 256 if has_own_channel else 64
        self._requests = 0
        self._last_s = float("-inf")
        self.pace = self._busy

    def window_pages(self, is_first: bool) -> int:
        """Pages of the next write; more of what the guest will want before all else."""
        return self._first_pages if is_first else self.pace.window_pages

    def update(self, requests: int, now_s: float) -> bool:
        """Look again.

        Args:
            requests: Requests so far for pages that the push was not about to send.
            now_s: Time.

        Returns:
            Whether the pace has changed.
        """
        if requests != self._requests:
            self._requests = requests
            self._last_s = now_s
        pace = self._busy if now_s - self._last_s < _BUSY_S else self._alone
        if pace is self.pace:
            return False
        self.pace = pace
        return True


FIRST_GIVES_WAY_S = 3.0
"""What a guest's first resume may take longer, so that all that it asks for is known."""

GIVES_WAY_S = 1.0
"""What any other may, so that a guest that asks here and there has its pages at once."""

_QUIET_S = 0.003
_LOOK_S = 0.001


class GivesWay:
    """Holds the push back while the guest asks for pages here and there; pure.

    What is pushed is in the way of what the guest waits for, and what came before it was asked
    for is never learned. Alone the guest has its pages so much sooner that little time is lost.
    One thread asks.

    Args:
        budget_s: How long it may hold the push back in all.
    """

    def __init__(self, budget_s: float) -> None:
        self._left_s = budget_s
        self._turns = -1
        self._heard_s = 0.0
        self._held_s: float | None = None

    def hold_s(self, turns: int, now_s: float) -> float:
        """Seconds to wait before asking again; 0 when the push may go on.

        Args:
            turns: Requests that came and those that were answered, together: odd while one
                waits for its answer, which a disk may take a while for.
            now_s: Time.
        """
        if self._held_s is not None:
            self._left_s -= now_s - self._held_s
            self._held_s = None
        if turns != self._turns or turns & 1:
            self._turns, self._heard_s = turns, now_s
        if self._left_s <= 0 or now_s - self._heard_s >= _QUIET_S:
            return 0.0
        self._held_s = now_s
        return _LOOK_S

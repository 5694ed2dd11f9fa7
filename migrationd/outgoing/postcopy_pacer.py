"""``max-postcopy-bandwidth``: even spacing, so that what is urgent never waits behind a burst."""

from dataclasses import dataclass

_CATCH_UP_S = 0.002


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
        """Change the limit at once; 0 is unlimited."""
        self._rate = bytes_per_s

    def charge(self, byte_count: int, now_s: float) -> None:
        """Account for bytes that were sent."""
        if self._rate:
            self._due_s = max(self._due_s, now_s - _CATCH_UP_S) + byte_count / self._rate

    def delay_s(self, now_s: float) -> float:
        """Seconds until bytes may be sent again; 0 when they may now."""
        if not self._rate:
            self._due_s = 0.0
            return 0.0
        return max(0.0, self._due_s - now_s)


_BUSY_S = 0.01


@dataclass(frozen=True, slots=True)
class Pace:
    """How the push shares a channel.

    Attributes:
        window_pages: Pages of one write: a request on the same channel waits for one.
        queue_bytes: What may lie in the kernel, before a request on the same channel.
    """

    window_pages: int
    queue_bytes: int


ALONE = Pace(window_pages=32, queue_bytes=256 << 10)
"""Nobody asks, or for what comes anyway: large pieces take half the processor time."""

SHARED = Pace(window_pages=8, queue_bytes=32 << 10)
"""Requests are answered on the same channel: what is before them is short."""

BESIDE = Pace(window_pages=32, queue_bytes=128 << 10)
"""Requests have a channel of their own. They wait for pages that are under way here only."""


class Shares:
    """Chooses the pace; pure, the time is handed in.

    Args:
        has_own_channel: Whether requests are answered on a channel of their own.
    """

    def __init__(self, *, has_own_channel: bool) -> None:
        self._busy = BESIDE if has_own_channel else SHARED
        self._requests = 0
        self._last_s = float("-inf")
        self.pace = self._busy

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
        pace = self._busy if now_s - self._last_s < _BUSY_S else ALONE
        if pace is self.pace:
            return False
        self.pace = pace
        return True

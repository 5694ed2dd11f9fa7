"""A byte budget over time, for all channels of a migration together.

What is sent runs up a debt that time pays off; nothing is sent while there is one. A write is
at most one window, and time that was not used is kept for two: so in no second more than 3 %
above the rate is sent, and a thread that woke late makes good for it.

QEMU counts windows of 100 ms, each from nothing: it may send a tenth more in a second.
"""

WINDOW_S = 0.01
"""Longest time that one write is worth."""

CREDIT_S = 2 * WINDOW_S
"""Unused time that is kept."""

_SHORTEST_WAIT_S = 1e-4
_LONGEST_WAIT_S = 0.1
"""The rate may change while somebody waits."""


class RateLimiter:
    """Budget of one migration; pure, the time is handed in.

    One thread at a time charges and asks; the rate may be set from another at any time.

    Args:
        bytes_per_s: The limit; 0 is unlimited.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._asked_s: float | None = None
        self._debt = 0.0

    @property
    def window_bytes(self) -> int | None:
        """Bytes of one window; None without a limit."""
        return int(self._rate * WINDOW_S) if self._rate else None

    def set_rate(self, bytes_per_s: int) -> None:
        """Change the limit at once; what was sent under the old one is forgotten."""
        if bytes_per_s != self._rate:
            self._rate = bytes_per_s
            self._asked_s = None

    def charge(self, byte_count: int) -> None:
        """Account for bytes that were sent."""
        self._debt += byte_count

    def delay_s(self, now_s: float) -> float:
        """Seconds until bytes may be sent again; 0 when they may now."""
        rate = self._rate
        if not rate or self._asked_s is None:
            self._asked_s = now_s
            self._debt = 0.0
            return 0.0
        paid = self._debt - (now_s - self._asked_s) * rate
        self._debt = max(paid, -CREDIT_S * rate)
        self._asked_s = now_s
        if self._debt <= 0:
            return 0.0
        return min(max(self._debt / rate, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)

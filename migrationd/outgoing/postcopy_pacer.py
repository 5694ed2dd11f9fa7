"""``max-postcopy-bandwidth``: even spacing, so that what is urgent never waits behind a burst."""

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

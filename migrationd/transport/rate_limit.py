"""A byte budget per time window, as QEMU counts it: bandwidth / 10 per 100 ms."""

WINDOW_S = 0.1


class RateLimiter:
    """Budget of one migration; pure, the time is handed in.

    One thread charges and asks; the rate may be set from another at any time.

    Args:
        bytes_per_s: The limit; 0 is unlimited.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._window_start_s: float | None = None
        self._spent = 0

    @property
    def window_bytes(self) -> int | None:
        """Bytes of one window; None without a limit."""
        return int(self._rate * WINDOW_S) if self._rate else None

    def set_rate(self, bytes_per_s: int) -> None:
        """Change the limit at once."""
        self._rate = bytes_per_s

    def charge(self, byte_count: int) -> None:
        """Account for bytes that were sent."""
        self._spent += byte_count

    def delay_s(self, now_s: float) -> float:
        """Seconds until bytes may be sent again; 0 when they may now.

        What a window was overdrawn by is paid back by the next ones.
        """
        rate = self._rate
        if not rate:
            self._window_start_s = None
            self._spent = 0
            return 0.0
        if self._window_start_s is None:
            self._window_start_s = now_s
        budget = rate * WINDOW_S
        passed = int((now_s - self._window_start_s) / WINDOW_S + 1e-9)
        if passed > 0:
            self._window_start_s += passed * WINDOW_S
            self._spent = max(0, self._spent - int(passed * budget))
        if self._spent < budget:
            return 0.0
        return max(self._window_start_s + WINDOW_S - now_s, 1e-4)

"""Time as a value that is handed in, so that pure code and tests own it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps back."""

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch, for time stamps."""


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds on the monotonic clock."""
        return time.monotonic()

    def wall_ns(self) -> int:
        """Nanoseconds of the real-time clock."""
        return time.time_ns()

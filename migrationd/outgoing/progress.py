"""How far one outgoing migration is: its points in time, its counters, why it failed.

Reference: the source's members of QEMU's ``query-migrate``.
"""

from typing import TYPE_CHECKING

from migrationd.clock import Clock
from migrationd.migration.info import MigrationInfo
from migrationd.migration.latency import LatencyStats
from migrationd.migration.stats import OutgoingStats

if TYPE_CHECKING:
    from migrationd.errors import MigrationdError

POSTCOPY_STATUSES = frozenset(
    (
        "postcopy-device",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
    )
)
"""Statuses in which the destination runs the guest, or may run it, without all of its memory."""

_STATUSES_WITH_RAM = POSTCOPY_STATUSES | {
    "active",
    "cancelling",
    "pre-switchover",
    "device",
    "completed",
}


class OutgoingProgress:
    """Marks on the way, set by the phases as they are reached; it begins when it is made.

    Args:
        stats: Counters.
        clock: Time.

    Attributes:
        stats: Counters.
        error: Why it failed or is paused.
    """

    def __init__(self, stats: OutgoingStats, clock: Clock) -> None:
        self.stats = stats
        self.error: MigrationdError | None = None
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self._setup_s: float | None = None
        self._switchover_s: float | None = None
        self._running_there_s: float | None = None
        self._end_s: float | None = None

    def mark_set_up(self) -> None:
        """The destination knows all that it must before the first page."""
        self._setup_s = self._clock.monotonic_s()

    def mark_switchover(self, since_s: float | None = None) -> None:
        """The guest stands still from here on, or since then; the first call counts."""
        self._switchover_s = self._switchover_s or since_s or self._clock.monotonic_s()
        self.stats.in_switchover = True

    def mark_running_there(self) -> None:
        """The destination runs the guest; the first call counts."""
        self._running_there_s = self._running_there_s or self._clock.monotonic_s()

    def mark_still(self, begin_s: float, end_s: float) -> None:
        """The guest stood still between these times, and goes on here."""
        self._switchover_s, self._running_there_s = begin_s, end_s

    def mark_end(self) -> None:
        """The destination has everything."""
        self._end_s = self._clock.monotonic_s()
        self.stats.finish(self._end_s - self._start_s)

    def info(
        self,
        status: str,
        *,
        downtime_limit_ms: int,
        stall: str | None = None,
        latency: LatencyStats | None = None,
    ) -> MigrationInfo | None:
        """The source's part of ``query-migrate``; None before anything happened.

        Args:
            status: MigrationStatus.
            downtime_limit_ms: What the expected downtime starts from.
            stall: Why it does not converge, if it does not.
            latency: Of requests for pages, to be shown at the end.
        """
        if status == "none":
            return None
        error_desc = None if self.error is None else str(self.error)
        if stall is not None and status == "active":
            error_desc = stall
        if status not in _STATUSES_WITH_RAM:
            return MigrationInfo(status=status, error_desc=error_desc)
        completed = status == "completed"
        is_stopped = completed or status in POSTCOPY_STATUSES
        now_s = self._end_s if self._end_s is not None else self._clock.monotonic_s()
        ram = self.stats.snapshot(completed=completed)
        downtime_s = (self._running_there_s or now_s) - (self._switchover_s or now_s)
        if not completed:
            latency = None
        return MigrationInfo(
            status=status,
            error_desc=error_desc,
            total_time_ms=_ms(now_s - self._start_s),
            setup_time_ms=_ms((self._setup_s or self._start_s) - self._start_s),
            downtime_ms=_ms(downtime_s) if is_stopped else None,
            cpu_throttle_percentage=None if completed else self.stats.throttle_percentage,
            expected_downtime_ms=None
            if is_stopped
            else self.stats.expected_downtime_ms(downtime_limit_ms),
            remaining_bytes=None if completed else ram.remaining,
            ram=ram,
            xbzrle=self.stats.xbzrle,
            dirty_limit_throttle_us=self.stats.limit_throttle_us,
            postcopy_latency_ns=latency.mean_ns if latency is not None else None,
            postcopy_latency_dist=latency.distribution() if latency is not None else None,
        )


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))

"""Counters of one outgoing migration and what ``query-migrate`` makes of them.

One thread writes (the outgoing loop), the event loop reads snapshots; each
counter is a plain int, so a read sees a value that was true a moment ago.

Reference: the meaning of each member is QEMU's ``MigrationStats``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from migrationd.migration.info import RamStats, XbzrleStats

MEASURE_WINDOW_S = 0.1
"""Bandwidth is measured over windows of this length."""


@dataclass(slots=True)
class OutgoingStats:
    """Counters of the outgoing loop.

    Attributes:
        page_size: Target page size in bytes.
        total_bytes: RAM of all blocks.
        normal_pages: Pages sent whole.
        duplicate_pages: Pages sent as ZERO records.
        transferred_bytes: Bytes written to all channels.
        precopy_bytes: Of these, before the switchover.
        downtime_bytes: Of these, after it.
        postcopy_bytes: Of these, while the guest ran at the destination.
        postcopy_requests: Page requests, those for pages under way included.
        remaining_pages: In postcopy, where zero pages are not sent, tells what must be.
        multifd_bytes: Of the transferred bytes, those on multifd channels.
        missed_zero_copy: Synchronisations of a channel behind which all pages were copied,
            although ``zero-copy-send`` is on.
        dirty_sync_count: Passes over the dirty bitmap that began.
        dirty_bytes: What a guest that runs has written and is not sent; None for one that does
            not run: then it is what was never sent.
        dirty_pages_rate: Pages that it wrote a second, over the last pass.
        throttle_percentage: Share of its time that it gives up; None without auto-converge.
        xbzrle: Counters of XBZRLE; None where nothing is sent twice.
        expected_downtime_s: Time that the rest of a guest that runs would take; None before it
            is known, and of one that does not run.
        limit_throttle_us: Time that the guest gave up in the last pass for ``dirty-limit``.
        mbps: Rate of the last complete window, megabits per second.
        pages_per_s: Pages of the last complete window, per second.
    """

    page_size: int
    total_bytes: int
    normal_pages: int = 0
    duplicate_pages: int = 0
    transferred_bytes: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    multifd_bytes: int = 0
    missed_zero_copy: int = 0
    dirty_sync_count: int = 0
    dirty_bytes: int | None = None
    dirty_pages_rate: int = 0
    throttle_percentage: int | None = None
    xbzrle: XbzrleStats | None = None
    expected_downtime_s: float | None = None
    limit_throttle_us: int | None = None
    mbps: float = 0.0
    pages_per_s: int = 0
    bytes_per_s: float = 0.0
    in_switchover: bool = False
    in_postcopy: bool = False
    postcopy_bytes: int = 0
    postcopy_requests: int = 0
    remaining_pages: Callable[[], int] | None = None
    _answered_bytes: int = 0
    _answered_normal: int = 0
    _answered_duplicate: int = 0
    _window_start_s: float | None = None
    _window_bytes: int = 0
    _window_pages: int = 0

    def sent(self, byte_count: int, *, normal: int = 0, duplicate: int = 0) -> None:
        """Account for bytes written, with the pages they carried."""
        self.normal_pages += normal
        self.duplicate_pages += duplicate
        self.transferred_bytes += byte_count
        if self.in_postcopy:
            self.postcopy_bytes += byte_count
        elif self.in_switchover:
            self.downtime_bytes += byte_count
        else:
            self.precopy_bytes += byte_count

    def answered(self, byte_count: int, pages: int) -> None:
        """Account for requested pages; has counters of its own, for another thread calls it."""
        normal = min(pages, byte_count // (self.page_size + 8))
        self._answered_bytes += byte_count
        self._answered_normal += normal
        self._answered_duplicate += pages - normal

    def sent_on_channel(self, byte_count: int, *, normal: int = 0, duplicate: int = 0) -> None:
        """Account for bytes written to a multifd channel; only one thread at a time."""
        self.normal_pages += normal
        self.duplicate_pages += duplicate
        self.transferred_bytes += byte_count
        self.multifd_bytes += byte_count

    def measure(self, now_s: float) -> None:
        """Close a measuring window if it is over."""
        if self._window_start_s is None:
            self._start_window(now_s)
            return
        elapsed_s = now_s - self._window_start_s
        if elapsed_s < MEASURE_WINDOW_S:
            return
        self._rate(
            self.transferred_bytes - self._window_bytes, self._pages - self._window_pages, elapsed_s
        )
        self._start_window(now_s)

    def finish(self, elapsed_s: float) -> None:
        """Set the rates to the mean of the whole migration."""
        self._rate(self.transferred_bytes, self._pages, max(elapsed_s, 1e-3))

    @property
    def remaining_bytes(self) -> int:
        """RAM that has not been sent."""
        if self.dirty_bytes is not None:
            return self.dirty_bytes
        if self.remaining_pages is not None:
            return self.remaining_pages() * self.page_size
        return max(0, self.total_bytes - self._pages * self.page_size)

    def expected_downtime_ms(self, downtime_limit_ms: int) -> int:
        """Estimate from what remains at the measured rate; the limit until it is known."""
        if self.expected_downtime_s is not None:
            return round(self.expected_downtime_s * 1000)
        if not self.bytes_per_s or self.dirty_bytes is not None:
            return downtime_limit_ms
        return int(self.remaining_bytes / self.bytes_per_s * 1000)

    def snapshot(self, *, completed: bool) -> RamStats:
        """What ``query-migrate`` shows in its ``ram`` member."""
        normal = self.normal_pages + self._answered_normal
        return RamStats(
            transferred=self.transferred_bytes + self._answered_bytes,
            remaining=0 if completed else self.remaining_bytes,
            total=self.total_bytes,
            duplicate=self.duplicate_pages + self._answered_duplicate,
            normal=normal,
            normal_bytes=normal * self.page_size,
            mbps=self.mbps,
            dirty_pages_rate=self.dirty_pages_rate,
            dirty_sync_count=self.dirty_sync_count,
            page_size=self.page_size,
            pages_per_second=self.pages_per_s,
            precopy_bytes=self.precopy_bytes,
            downtime_bytes=self.downtime_bytes,
            postcopy_bytes=self.postcopy_bytes + self._answered_bytes,
            postcopy_requests=self.postcopy_requests,
            multifd_bytes=self.multifd_bytes,
            dirty_sync_missed_zero_copy=self.missed_zero_copy,
        )

    @property
    def _pages(self) -> int:
        return self.normal_pages + self.duplicate_pages

    def _start_window(self, now_s: float) -> None:
        self._window_start_s = now_s
        self._window_bytes = self.transferred_bytes
        self._window_pages = self._pages

    def _rate(self, byte_count: int, pages: int, elapsed_s: float) -> None:
        self.bytes_per_s = byte_count / elapsed_s
        self.mbps = self.bytes_per_s * 8 / 1e6
        self.pages_per_s = int(pages / elapsed_s)

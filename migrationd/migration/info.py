"""What ``query-migrate`` can say, as plain values.

Reference: members and their meaning follow QEMU's ``MigrationInfo`` and
``MigrationStats``; times are milliseconds, sizes bytes.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RamStats:
    """Counters of one outgoing migration (QMP ``MigrationStats``)."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    normal: int = 0
    normal_bytes: int = 0
    dirty_pages_rate: int = 0
    mbps: float = 0.0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    page_size: int = 4096
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0


@dataclass(frozen=True, slots=True)
class XbzrleStats:
    """Counters of XBZRLE (QMP ``XBZRLECacheStats``); the rates are those of the last pass."""

    cache_size: int
    bytes: int = 0
    pages: int = 0
    cache_miss: int = 0
    cache_miss_rate: float = 0.0
    encoding_rate: float = 0.0
    overflow: int = 0


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """One side's answer to ``query-migrate``; None means that the member is absent."""

    status: str
    error_desc: str | None = None
    total_time_ms: int | None = None
    setup_time_ms: int | None = None
    downtime_ms: int | None = None
    expected_downtime_ms: int | None = None
    remaining_bytes: int | None = None
    cpu_throttle_percentage: int | None = None
    ram: RamStats | None = None
    xbzrle: XbzrleStats | None = None
    dirty_limit_throttle_us: int | None = None
    postcopy_blocktime_ms: int | None = None
    postcopy_vcpu_blocktime_ms: tuple[int, ...] | None = None
    postcopy_vcpu_latency_ns: tuple[int, ...] | None = None
    postcopy_non_vcpu_latency_ns: int | None = None
    postcopy_latency_ns: int | None = None
    postcopy_latency_dist: tuple[int, ...] | None = None
    socket_address: tuple[dict[str, object], ...] = field(default=())

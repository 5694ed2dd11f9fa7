"""Request latencies: count, mean and distribution, in constant memory."""

from dataclasses import dataclass, field

_SUB_BITS = 2
"""Buckets per power of two, as a power of two: a quantile is exact to a fifth."""

_BUCKETS = 64 << _SUB_BITS

LATENCY_DIST_BUCKETS = 24
"""Buckets of QEMU's ``postcopy-latency-dist``: below 2 us, then one per power of two."""


@dataclass(slots=True)
class LatencyStats:
    """Latencies of one kind; one thread adds, others read.

    Attributes:
        count: How many.
        total_ns: Their sum.
        longest_ns: The longest.
    """

    count: int = 0
    total_ns: int = 0
    longest_ns: int = 0
    _buckets: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    _micros: list[int] = field(default_factory=lambda: [0] * LATENCY_DIST_BUCKETS)

    def add(self, duration_ns: int) -> None:
        """Count one latency."""
        self.count += 1
        self.total_ns += duration_ns
        self.longest_ns = max(self.longest_ns, duration_ns)
        self._buckets[_bucket(duration_ns)] += 1
        power = (duration_ns // 1000).bit_length() - 1
        self._micros[min(max(power, 0), LATENCY_DIST_BUCKETS - 1)] += 1

    @property
    def mean_ns(self) -> int:
        """Mean; 0 when there is none."""
        return self.total_ns // self.count if self.count else 0

    def quantile_ns(self, fraction: float) -> int:
        """The latency that this fraction stays below, to a fifth; 0 when there is none."""
        rank = fraction * self.count
        seen = 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if count and seen >= rank:
                return min(_upper_ns(bucket), self.longest_ns)
        return 0

    def distribution(self) -> tuple[int, ...]:
        """Counts as QEMU's ``postcopy-latency-dist``: microseconds by powers of two."""
        return tuple(self._micros)


def _bucket(value: int) -> int:
    shift = max(value.bit_length() - _SUB_BITS - 1, 0)
    return min((shift << _SUB_BITS) + (value >> shift), _BUCKETS - 1)


def _upper_ns(bucket: int) -> int:
    """Largest value of a bucket."""
    shift = max((bucket >> _SUB_BITS) - 1, 0)
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1

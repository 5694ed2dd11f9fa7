"""Latencies in buckets."""

import numpy as np
import pytest

from migrationd.migration.latency import LATENCY_DIST_BUCKETS, LatencyStats


def test_nothing_yet() -> None:
    stats = LatencyStats()
    assert (stats.mean_ns, stats.quantile_ns(0.99), sum(stats.distribution())) == (0, 0, 0)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_quantiles_are_exact_to_a_fifth(fraction: float) -> None:
    values = np.random.default_rng(1).lognormal(10, 1.5, 5000).astype(np.int64)
    stats = LatencyStats()
    for value in values.tolist():
        stats.add(value)
    exact = float(np.quantile(values, fraction))
    assert exact * 0.99 <= stats.quantile_ns(fraction) <= exact * 1.25
    assert stats.mean_ns == int(values.sum()) // 5000
    assert sum(stats.distribution()) == 5000


@pytest.mark.parametrize(
    ("micros", "bucket"), [(0, 0), (1, 0), (2, 1), (5, 2), (9, 3), (60_000_000, 23)]
)
def test_the_distribution_is_qemus(micros: int, bucket: int) -> None:
    stats = LatencyStats()
    stats.add(micros * 1000)
    expected = [0] * LATENCY_DIST_BUCKETS
    expected[bucket] = 1
    assert list(stats.distribution()) == expected


def test_any_value_is_counted() -> None:
    stats = LatencyStats()
    for value in (0, 1, 2, 3, 4, 7, 8, 1 << 40, 1 << 80):
        stats.add(value)
    assert stats.count == 9
    assert stats.quantile_ns(1.0) <= stats.longest_ns == 1 << 80

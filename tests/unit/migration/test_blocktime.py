"""Waits of several threads, alone and at once."""

from migrationd.migration.blocktime import Blocktime, with_blocktime
from migrationd.migration.info import MigrationInfo

MS = 1_000_000


def test_a_wait_of_the_only_thread_is_a_wait_of_all() -> None:
    times = Blocktime()
    times.begin(7, 10 * MS)
    times.end(7, 10 * MS, 13 * MS)
    assert times.all_blocked_ns == 3 * MS
    assert times.thread_blocked_ns == (3 * MS,)
    assert times.latency.mean_ns == 3 * MS


def test_of_two_threads_only_the_common_time_counts() -> None:
    times = Blocktime()
    for thread in (1, 2):
        times.begin(thread, 0)
        times.end(thread, 0, 0)
    times.begin(1, 10 * MS)
    times.begin(2, 14 * MS)
    times.end(1, 10 * MS, 15 * MS)
    times.end(2, 14 * MS, 24 * MS)
    assert times.all_blocked_ns == 1 * MS
    assert times.thread_blocked_ns == (5 * MS, 10 * MS)


def test_a_thread_that_appears_ends_the_time_of_those_before() -> None:
    times = Blocktime()
    times.begin(1, 0)
    times.begin(2, 4 * MS)
    times.end(1, 0, 6 * MS)
    times.end(2, 4 * MS, 9 * MS)
    assert times.all_blocked_ns == 6 * MS


def test_threads_that_are_not_told_apart_wait_once() -> None:
    times = Blocktime()
    times.begin(0, 0)
    times.begin(0, 2 * MS)
    times.end(0, 0, 5 * MS)
    times.end(0, 2 * MS, 6 * MS)
    assert times.thread_blocked_ns == (6 * MS,)
    assert times.latency.count == 2


def test_what_a_destination_says() -> None:
    times = Blocktime()
    times.begin(1, 0)
    times.end(1, 0, 2_500_000)
    info = with_blocktime(MigrationInfo("completed"), times)
    assert info.postcopy_blocktime_ms == 2
    assert info.postcopy_vcpu_blocktime_ms == (2,)
    assert info.postcopy_vcpu_latency_ns == (2_500_000,)
    assert sum(info.postcopy_latency_dist or ()) == 1

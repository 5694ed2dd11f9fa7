"""Counters become what query-migrate shows."""

from migrationd.migration.stats import OutgoingStats

MIB = 1 << 20


def make() -> OutgoingStats:
    return OutgoingStats(page_size=4096, total_bytes=MIB)


def test_pages_reduce_what_remains() -> None:
    stats = make()
    stats.sent(4104 * 10, normal=10)
    stats.sent(9 * 6, duplicate=6)
    ram = stats.snapshot(completed=False)
    assert (ram.normal, ram.duplicate, ram.normal_bytes) == (10, 6, 40960)
    assert ram.remaining == MIB - 16 * 4096
    assert ram.transferred == ram.precopy_bytes == 4104 * 10 + 54


def test_bytes_after_the_switchover_are_downtime_bytes() -> None:
    stats = make()
    stats.sent(100)
    stats.in_switchover = True
    stats.sent(23)
    ram = stats.snapshot(completed=True)
    assert (ram.precopy_bytes, ram.downtime_bytes, ram.transferred) == (100, 23, 123)
    assert ram.remaining == 0


def test_rate_of_a_window_and_of_the_whole() -> None:
    stats = make()
    stats.measure(8.0)
    stats.sent(1_000_000, normal=100)
    stats.measure(8.0625)
    assert stats.mbps == 0
    stats.measure(8.125)
    assert round(stats.mbps) == 64
    assert stats.pages_per_s == 800
    stats.finish(2.0)
    assert stats.mbps == 4.0


def test_expected_downtime_is_the_limit_until_a_rate_is_known() -> None:
    stats = make()
    assert stats.expected_downtime_ms(300) == 300
    stats.measure(0.0)
    stats.sent(MIB)
    stats.measure(0.125)
    assert stats.expected_downtime_ms(300) == 125

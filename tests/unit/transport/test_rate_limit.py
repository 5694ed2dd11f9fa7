import pytest

from migrationd.transport.rate_limit import WINDOW_S, RateLimiter


def test_no_limit() -> None:
    limiter = RateLimiter(0)
    limiter.charge(1 << 40)
    assert limiter.delay_s(0.0) == 0
    assert limiter.window_bytes is None


def test_a_window_has_its_budget() -> None:
    limiter = RateLimiter(1000)
    assert limiter.window_bytes == 100
    assert limiter.delay_s(5.0) == 0
    limiter.charge(99)
    assert limiter.delay_s(5.01) == 0
    limiter.charge(1)
    assert limiter.delay_s(5.02) == pytest.approx(0.08)
    assert limiter.delay_s(5.0 + WINDOW_S) == 0


def test_what_was_overdrawn_is_paid_back() -> None:
    limiter = RateLimiter(1000)
    limiter.delay_s(0.0)
    limiter.charge(350)
    assert limiter.delay_s(0.15) > 0
    assert limiter.delay_s(0.25) > 0
    assert limiter.delay_s(0.35) == 0
    limiter.charge(50)
    assert limiter.delay_s(0.36) > 0


def test_idle_windows_are_not_saved_up() -> None:
    limiter = RateLimiter(1000)
    limiter.delay_s(0.0)
    assert limiter.delay_s(100.0) == 0
    limiter.charge(100)
    assert limiter.delay_s(100.01) > 0


def test_the_rate_changes_at_once() -> None:
    limiter = RateLimiter(1000)
    limiter.delay_s(0.0)
    limiter.charge(500)
    assert limiter.delay_s(0.01) > 0
    limiter.set_rate(100_000)
    assert limiter.delay_s(0.01) == 0
    limiter.set_rate(0)
    assert limiter.delay_s(0.01) == 0
    limiter.set_rate(10)
    assert limiter.delay_s(0.01) == 0
    limiter.charge(1)
    assert limiter.delay_s(0.02) > 0


def test_the_long_run_rate() -> None:
    limiter = RateLimiter(1_000_000)
    now, sent = 0.0, 0
    while now < 10.0:
        delay = limiter.delay_s(now)
        if delay:
            now += delay
            continue
        limiter.charge(7777)
        sent += 7777
        now += 0.0001
    assert sent / now == pytest.approx(1_000_000, rel=0.02)


@pytest.mark.parametrize("rate", [1, 3, 9, 10, 1 << 62])
def test_extreme_rates(rate: int) -> None:
    limiter = RateLimiter(rate)
    assert limiter.delay_s(0.0) == 0
    limiter.charge(1)
    assert limiter.delay_s(0.0) >= 0
    assert limiter.delay_s(2.0) == 0

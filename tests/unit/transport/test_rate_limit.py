import random

import pytest

from migrationd.transport.rate_limit import CREDIT_S, WINDOW_S, RateLimiter


def test_no_limit() -> None:
    limiter = RateLimiter(0)
    limiter.charge(1 << 40)
    assert limiter.delay_s(0.0) == 0
    assert limiter.window_bytes is None


def test_time_pays_the_debt() -> None:
    limiter = RateLimiter(1000)
    assert limiter.window_bytes == 1000 * WINDOW_S
    assert limiter.delay_s(5.0) == 0
    limiter.charge(50)
    assert limiter.delay_s(5.0) == pytest.approx(0.05)
    assert limiter.delay_s(5.02) == pytest.approx(0.03)
    assert limiter.delay_s(5.0501) == 0
    limiter.charge(1000)
    assert limiter.delay_s(5.0501) == 0.1  # a change of the rate must not wait for it
    assert limiter.delay_s(6.04) > 0
    assert limiter.delay_s(6.06) == 0


def test_idle_time_is_kept_for_a_moment_only() -> None:
    limiter = RateLimiter(1000)
    limiter.delay_s(0.0)
    assert limiter.delay_s(100.0) == 0
    limiter.charge(int(1000 * CREDIT_S))
    assert limiter.delay_s(100.0) == 0
    limiter.charge(1)
    assert limiter.delay_s(100.0) > 0


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [1 << 20, 100 << 20, 5 << 30])
def test_every_second_has_its_bytes_although_threads_wake_late(seed: int, rate: int) -> None:
    chance = random.Random(seed)
    limiter = RateLimiter(rate)
    now, total = 0.0, 0
    sent = [(0.0, 0)]
    window = limiter.window_bytes
    assert window is not None
    while now < 4.0:
        delay = limiter.delay_s(now)
        if delay:
            now += delay + chance.expovariate(1 / 0.0005) + (chance.random() < 0.01) * 0.008
            continue
        size = chance.randint(max(1, window // 2), window)
        limiter.charge(size)
        total += size
        now += 1e-5
        sent.append((now, total))
    for begin_s in (0.5 + i * 0.0173 for i in range(140)):
        before = max(size for at, size in sent if at <= begin_s)
        after = max(size for at, size in sent if at <= begin_s + 1)
        assert (after - before) / rate == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rate", [1, 3, 9, 10, 1 << 62])
def test_extreme_rates(rate: int) -> None:
    limiter = RateLimiter(rate)
    assert limiter.delay_s(0.0) == 0
    limiter.charge(1)
    assert limiter.delay_s(0.0) >= 0
    assert limiter.delay_s(2.0) == 0

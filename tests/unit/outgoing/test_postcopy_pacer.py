"""The rate of the push behind a postcopy."""

from migrationd.outgoing.postcopy_pacer import Pacer


def test_who_waits_hears_of_a_new_rate() -> None:
    """A window of 128 KiB at 5,000 B/s is worth 26 seconds; nobody may sleep through them."""
    pacer = Pacer(5_000)
    pacer.charge(128 << 10, 100.0)
    assert 0 < pacer.delay_s(100.0) <= 0.1
    assert 0 < pacer.delay_s(120.0) <= 0.1
    assert pacer.delay_s(127.0) == 0
    pacer.charge(128 << 10, 127.0)
    pacer.set_rate(1 << 20)
    assert pacer.delay_s(127.0) == 0
    pacer.charge(1 << 20, 127.0)
    assert pacer.delay_s(127.5) > 0
    pacer.set_rate(0)
    assert pacer.delay_s(127.5) == 0


def test_a_write_under_a_limit_is_short() -> None:
    assert Pacer(0).most_bytes() is None
    assert Pacer(5_000).most_bytes() == 50, "a look at the limit each 10 ms"
    for rate in (100 << 20, 200 << 20):
        assert Pacer(rate).most_bytes() == 128 << 10, "a request waits for a tenth of a millisecond"
    assert Pacer(10 << 30).most_bytes() == (10 << 30) // 2000

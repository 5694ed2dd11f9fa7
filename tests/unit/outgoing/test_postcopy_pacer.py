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

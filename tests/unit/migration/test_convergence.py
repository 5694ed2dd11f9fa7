"""When the guest is stopped."""

from migrationd.migration.convergence import (
    EXTRA_PASSES,
    STALL_S,
    Convergence,
    Decision,
    Pass,
    ThrottleSettings,
)
from migrationd.migration.dirty_limit import DirtyLimit

GIB = 1 << 30
LIMIT_S = 0.3


def test_it_goes_on_while_the_rest_does_not_fit() -> None:
    convergence = Convergence()
    assert convergence.after(Pass(GIB, GIB, 1.0), LIMIT_S) is Decision.GO_ON
    assert convergence.expected_downtime_s(GIB) == 1.0


def test_a_rest_that_fits_is_still_made_smaller_while_that_pays() -> None:
    convergence = Convergence()
    assert convergence.after(Pass(GIB // 5, GIB, 1.0), LIMIT_S) is Decision.GO_ON
    assert convergence.after(Pass(GIB // 16, GIB // 4, 0.25), LIMIT_S) is Decision.GO_ON
    assert convergence.after(Pass(GIB // 17, GIB // 16, 0.06), LIMIT_S) is Decision.SWITCH_OVER


def test_an_empty_or_tiny_rest_ends_at_once() -> None:
    assert Convergence().after(Pass(0, GIB, 1.0), LIMIT_S) is Decision.SWITCH_OVER
    assert Convergence().after(Pass(GIB // 1000, GIB, 1.0), LIMIT_S) is Decision.SWITCH_OVER


def test_a_promised_rate_counts_in_place_of_the_measured_one() -> None:
    slow = Pass(GIB // 5, GIB // 100, 1.0)
    assert Convergence().after(slow, LIMIT_S) is Decision.GO_ON
    convergence = Convergence()
    convergence.after(slow, LIMIT_S, 4 * GIB)
    assert convergence.expected_downtime_s(GIB) == 0.25
    assert convergence.after(slow, LIMIT_S, 4 * GIB) is Decision.SWITCH_OVER
    assert Convergence().after(Pass(GIB // 16, GIB, 1.0), LIMIT_S, 1 << 20) is Decision.GO_ON
    assert convergence.after(slow, LIMIT_S, 0) is Decision.GO_ON


def test_a_rest_that_goes_up_and_down_is_a_stall_as_well() -> None:
    """Of a guest that writes in bursts as short as the passes, which are 10 ms apart."""
    convergence = Convergence()
    convergence.after(Pass(8 << 20, 32 << 20, 0.5), 0.001)
    for number in range(450):
        rest = (200 << 10) + (400 << 10) * (number % 2)
        done = Pass(rest, rest, 0.004, rest, waited_s=0.006)
        assert convergence.after(done, 0.001) is Decision.GO_ON
        if number < 300:
            assert convergence.stall is None
    assert convergence.stall is not None
    assert "1 ms are allowed" in convergence.stall
    convergence.after(Pass(100 << 10, 200 << 10, 0.004, 200 << 10, 0.006), 0.001)
    assert convergence.stall is None, "it has come nearer"


def test_a_rest_that_fits_until_the_guest_is_stopped_is_a_stall_as_well() -> None:
    convergence = Convergence()
    convergence.after(Pass(GIB // 2, GIB, 1.0), LIMIT_S)
    for _ in range(80):
        while convergence.after(Pass(GIB // 10, GIB, 1.0), LIMIT_S) is Decision.GO_ON:
            pass
        convergence.went_on(GIB, LIMIT_S)
    assert convergence.stall is not None
    assert "1000 ms of downtime would be needed" in convergence.stall


def test_extra_passes_are_bounded() -> None:
    convergence = Convergence()
    rest = GIB // 5
    decisions = []
    while not decisions or decisions[-1] is Decision.GO_ON:
        decisions.append(convergence.after(Pass(rest, GIB, 1.0), LIMIT_S))
        rest = rest * 6 // 10
    assert len(decisions) <= EXTRA_PASSES + 1


def test_a_limit_of_zero_waits_for_nothing_left() -> None:
    convergence = Convergence()
    assert convergence.after(Pass(4096, GIB, 1.0), 0.0) is Decision.GO_ON
    assert convergence.after(Pass(0, 4096, 0.1), 0.0) is Decision.SWITCH_OVER


def test_a_limit_that_is_raised_meanwhile_ends_it() -> None:
    convergence = Convergence()
    for _ in range(3):
        assert convergence.after(Pass(GIB, GIB, 1.0), LIMIT_S) is Decision.GO_ON
    assert convergence.after(Pass(GIB, GIB, 1.0), 2.0) is Decision.SWITCH_OVER


def test_a_stall_is_explained_and_forgotten() -> None:
    convergence = Convergence()
    for _ in range(int(STALL_S)):
        assert convergence.stall is None
        convergence.after(Pass(GIB, GIB, 1.0), LIMIT_S)
    assert convergence.stall is not None
    assert "writes 1074 MB/s and 1074 MB/s are sent" in convergence.stall
    assert "300 ms are allowed" in convergence.stall
    convergence.after(Pass(GIB // 8, GIB, 1.0), LIMIT_S)
    assert convergence.stall is None


def test_the_guest_is_slowed_down_step_by_step_up_to_the_maximum() -> None:
    convergence = Convergence(ThrottleSettings(20, 30, 75, 50))
    seen = []
    for _ in range(10):
        convergence.after(Pass(GIB, GIB, 1.0), LIMIT_S)
        seen.append(convergence.throttle_percentage)
    assert seen == [0, 20, 20, 50, 50, 75, 75, 75, 75, 75]
    assert convergence.stall is not None, "slower than this it does not get"


def test_a_guest_that_writes_little_is_not_slowed_down() -> None:
    convergence = Convergence(ThrottleSettings())
    for _ in range(6):
        convergence.after(Pass(int(0.45 * GIB), GIB, 1.0), 0.1)
    assert convergence.throttle_percentage == 0


def test_a_pass_that_something_disturbed_is_not_the_moment() -> None:
    convergence = Convergence()
    convergence.after(Pass(GIB // 16, GIB, 1.0), LIMIT_S)
    assert convergence.after(Pass(GIB // 64, 0, 0.05, GIB // 16), LIMIT_S) is Decision.GO_ON
    # Held up for a while: three times as much was written meanwhile.
    assert convergence.after(Pass(GIB // 20, 0, 0.05, GIB // 64), LIMIT_S) is Decision.GO_ON
    assert convergence.after(Pass(GIB // 64, 0, 0.02, GIB // 20), LIMIT_S) is Decision.SWITCH_OVER


def test_edits_and_zero_pages_count_as_the_memory_that_they_stand_for() -> None:
    convergence = Convergence()
    assert convergence.after(Pass(GIB // 4, GIB // 8, 1.0), LIMIT_S) is Decision.GO_ON
    done = Pass(GIB // 8, GIB // 1000, 0.25, GIB // 4)
    convergence.after(done, LIMIT_S)
    assert 0.12 < convergence.expected_downtime_s(done.rest_bytes) < 0.13


def test_the_slower_of_what_was_measured_counts() -> None:
    convergence = Convergence()
    convergence.after(Pass(GIB, GIB, 1.0), LIMIT_S)
    convergence.after(Pass(GIB, GIB // 64, 0.05, GIB // 64), LIMIT_S)
    assert convergence.expected_downtime_s(GIB // 4) > 0.7


def test_a_short_limit_leaves_half_of_it_to_the_rest_of_the_switchover() -> None:
    for limit_s, rest_s in ((0.3, 0.22), (0.05, 0.024), (0.01, 0.0049)):
        convergence = Convergence()
        convergence.after(Pass(GIB, GIB, 1.0), 0.0)
        assert convergence.fits(int(rest_s * GIB), limit_s)
        assert not convergence.fits(int(rest_s * GIB * 1.1), limit_s)


def test_a_first_pass_that_cannot_help_is_explained_while_it_lasts() -> None:
    convergence = Convergence()
    line, written = 125e6, 188e6
    for half_seconds in range(1, 9):
        now_s = half_seconds / 2
        # It writes the same 256 MB again after a while, which does not look like writing.
        convergence.during(now_s, int(min(256e6, written * now_s)), int(line * now_s), LIMIT_S)
        if now_s < STALL_S:
            assert convergence.stall is None
    assert convergence.stall is not None
    assert "writes 188 MB/s and 125 MB/s are sent" in convergence.stall
    assert convergence.stall.endswith("or turn auto-converge or xbzrle or postcopy-ram on")
    convergence.after(Pass(256 << 20, 256 << 20, 2.1), LIMIT_S)
    convergence.after(Pass(256 << 20, 256 << 20, 2.1, 256 << 20), LIMIT_S)
    assert "writes 128 MB/s and 128 MB/s are sent" in convergence.stall
    convergence = Convergence()
    for half_seconds in range(1, 20):
        now_s = half_seconds / 2
        convergence.during(now_s, int(40e6 * now_s), int(line * now_s), LIMIT_S)
    assert convergence.stall is None


def test_a_dirty_limit_comes_into_service_and_holds_the_rate() -> None:
    limit = DirtyLimit(50 << 20)
    convergence = Convergence(None, limit)
    unhindered = 400 << 20
    seen = []
    for _ in range(8):
        rate = int(unhindered * (1 - convergence.throttle_percentage / 100))
        convergence.after(Pass(rate, 100 << 20, 1.0), 0.1)
        seen.append(rate >> 20)
    assert seen[:3] == [400, 400, 400], "two passes that are too high bring it into service"
    assert abs(seen[-1] - 50) <= 4
    percentage = convergence.throttle_percentage
    for _ in range(8):
        percentage = limit.adjust((20 << 20) * (1 - percentage / 100))
    assert percentage == 0, "a guest that writes less has its time again"


def test_short_passes_together_are_one_look_at_what_the_guest_writes() -> None:
    convergence = Convergence(ThrottleSettings(20, 10, 99, 50))
    for _ in range(150):
        convergence.after(Pass(GIB, GIB // 100, 0.01, GIB // 100), 0.1)
    assert convergence.throttle_percentage == 0
    for _ in range(60):
        convergence.after(Pass(GIB, GIB // 100, 0.01, GIB // 100), 0.1)
    assert convergence.throttle_percentage == 20

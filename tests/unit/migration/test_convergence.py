"""When the guest is stopped."""

from migrationd.migration.convergence import (
    EXTRA_PASSES,
    STALL_S,
    Convergence,
    Decision,
    Pass,
    ThrottleSettings,
)

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

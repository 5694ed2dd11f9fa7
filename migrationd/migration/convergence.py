"""When a running guest is stopped, and when it is slowed down. Pure.

After each pass over the dirty pages the rest is compared with what can be sent within
``downtime-limit``. QEMU stops the guest as soon as the rest fits. Here another pass is
made while it still shrinks the rest, for every page that is not left over is downtime
saved; the guest is stopped when it does not pay any more.

Reference: meaning of ``downtime-limit``, ``cpu-throttle-*``, ``throttle-trigger-threshold`` and
``vcpu-dirty-limit`` as in QEMU 11.1.
"""

from dataclasses import dataclass
from enum import Enum

from migrationd.migration.dirty_limit import DirtyLimit

GOOD_SHRINK = 0.9
"""Another pass pays if it leaves at most this share of the least rest so far."""

GOOD_MOMENT = 1.1
"""A rest of more than this many times the least one is a pass that something disturbed."""

EXTRA_PASSES = 24
"""Most passes after the first one whose rest fits the limit."""

EXTRA_S = 3.0
"""Longest time that these may take."""

TINY_REST_S = 0.002
"""A rest that takes less than this is never worth another pass."""

STALL_S = 2.0
"""Without progress for this long it is called a stall."""

STUCK_S = 4.0
"""The same of passes whose rest shrinks and grows, and is never smaller than it was before."""

MARGIN = 0.75
"""Share of the downtime limit that the rest may take: stopping, devices and start take time too."""

FIXED_S = 0.03
"""What those take at most, where the limit is long enough to leave it to them."""

THROTTLE_PERIOD_S = 1.0
"""The guest is slowed down by one step at most for each period of passes, as at QEMU."""

SURE_S = 0.005
"""A pass of this length says what the line can do now."""


class Decision(Enum):
    """What to do after a pass."""

    GO_ON = "go on"
    SWITCH_OVER = "switch over"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over dirty pages.

    Attributes:
        rest_bytes: Dirty memory that the next pass, or the switchover, has to send.
        sent_bytes: Bytes that this pass put on the wire.
        duration_s: How long that took.
        covered_bytes: Dirty memory that it was about, which may be more than was sent (zero
            pages, edits) and says how long the rest will take; None for a first pass, which
            is about other memory than what is dirty.
        waited_s: How long the next look was put off after that: a pass may be very short.
    """

    rest_bytes: int
    sent_bytes: int
    duration_s: float
    covered_bytes: int | None = None
    waited_s: float = 0.0

    @property
    def done_bytes(self) -> int:
        """What the rate is measured by."""
        return self.sent_bytes if self.covered_bytes is None else self.covered_bytes


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """Parameters of ``auto-converge``, percent."""

    initial: int = 20
    increment: int = 10
    maximum: int = 99
    trigger_threshold: int = 50


class Convergence:
    """Decides after each pass of one migration.

    Args:
        throttle: Steps of ``auto-converge``; None if it is off.
        dirty_limit: With ``dirty-limit`` in its place, keeps the guest's rate of writing.
        trigger_threshold: ``throttle-trigger-threshold`` of ``dirty-limit``.
        has_edits: Whether pages that go again are edits: the first pass then tells nothing of
            how the others will be.
        has_postcopy: Whether the rest can go by postcopy.

    Attributes:
        bytes_per_s: Rate at which dirty memory is sent; 0 before it is known.
        throttle_percentage: Share of time that the guest has to give up.
        stall: Why the migration will not end by itself, in plain words; None if it may.
    """

    def __init__(
        self,
        throttle: ThrottleSettings | None = None,
        dirty_limit: DirtyLimit | None = None,
        trigger_threshold: int = 50,
        *,
        has_edits: bool = False,
        has_postcopy: bool = False,
    ) -> None:
        self._throttle = throttle
        self._dirty_limit = dirty_limit
        self._threshold = throttle.trigger_threshold if throttle else trigger_threshold
        self._has_edits = has_edits
        self._has_postcopy = has_postcopy
        self._before: Pass | None = None
        self._least_rest: int | None = None
        self._fitting_passes = 0
        self._fitting_s = 0.0
        self._high_periods = 0
        self._period = Pass(0, 0, 0.0, 0)
        self._stalled_s = 0.0
        self._best_rest: int | None = None
        self._no_better_s = 0.0
        self._looks: list[tuple[float, int]] = []
        self._write_rate = 0.0
        self._hopeless_s = 0.0
        self._available_bytes_per_s = 0
        self._last_rate = 0.0
        self.bytes_per_s = 0.0
        self.throttle_percentage = 0
        self.stall: str | None = None

    @property
    def is_dirty_limited(self) -> bool:
        """Whether ``dirty-limit`` is in service."""
        return self._dirty_limit is not None and self._dirty_limit.is_in_service

    def after(
        self, done: Pass, downtime_limit_s: float, available_bytes_per_s: int = 0
    ) -> Decision:
        """Look at a pass.

        Args:
            done: The pass that has just ended.
            downtime_limit_s: Longest downtime that is allowed, as it is now.
            available_bytes_per_s: Rate that somebody promises for the switchover
                (``avail-switchover-bandwidth``); 0 to go by what was measured.
        """
        self._available_bytes_per_s = available_bytes_per_s
        self._measure(done)
        if not self._looks:
            self._write_rate = done.rest_bytes / max(done.duration_s, 1e-3)
        self._looks.clear()
        before, self._before = self._before, done
        self._note_best(done)
        expected_s = self.expected_downtime_s(done.rest_bytes)
        if self.fits(done.rest_bytes, downtime_limit_s):
            if self._no_better_s < STUCK_S:
                self.stall = None
            return self._choose_moment(done, expected_s)
        self._least_rest = None
        self._fitting_passes = 0
        self._fitting_s = 0.0
        if self._has_edits and before is None:
            return Decision.GO_ON
        self._slow_down(done)
        self._look_for_stall(before, done, downtime_limit_s)
        return Decision.GO_ON

    def during(
        self, elapsed_s: float, written_bytes: int, done_bytes: int, downtime_limit_s: float
    ) -> None:
        """Look at a pass that takes long, while it lasts.

        Args:
            elapsed_s: Since it began.
            written_bytes: Memory that was written since then, each page once.
            done_bytes: Memory that it has sent.
            downtime_limit_s: As for :meth:`after`.
        """
        before_s, before_bytes = self._looks[-1] if self._looks else (0.0, 0)
        self._looks.append((elapsed_s, written_bytes))
        if elapsed_s <= before_s:
            return
        growth = (written_bytes - before_bytes) / (elapsed_s - before_s)
        # A guest that writes the same pages again seems to write less and less.
        self._write_rate = max(growth, self._write_rate if len(self._looks) > 1 else 0.0)
        if self._dirty_limit is not None and self._dirty_limit.is_in_service:
            if len(self._looks) == 1:
                self.throttle_percentage = self._dirty_limit.adjust(growth)
            return
        if self._throttle is not None or self._dirty_limit is not None or self._has_edits:
            return
        line = done_bytes / elapsed_s
        is_hopeless = (
            self._write_rate >= GOOD_SHRINK * line
            and written_bytes > MARGIN * downtime_limit_s * line
        )
        self._hopeless_s = self._hopeless_s + elapsed_s - before_s if is_hopeless else 0.0
        if self._hopeless_s >= STALL_S:
            self.stall = _stall_text(
                self._write_rate,
                line,
                written_bytes / max(line, 1.0),
                downtime_limit_s,
                self._others,
            )

    def fits(self, rest_bytes: int, downtime_limit_s: float) -> bool:
        """Whether a rest leaves time for the other things that a switchover takes."""
        less_fixed_s = max(downtime_limit_s / 2, downtime_limit_s - FIXED_S)
        allowed_s = min(MARGIN * downtime_limit_s, less_fixed_s)
        return self.expected_downtime_s(rest_bytes) <= allowed_s

    def expected_downtime_s(self, rest_bytes: int) -> float:
        """Time that a rest takes; infinite before the rate is known."""
        if not rest_bytes:
            return 0.0
        rate = self._available_bytes_per_s or min(self.bytes_per_s, self._last_rate)
        return rest_bytes / rate if rate else float("inf")

    def went_on(self, rest_bytes: int, downtime_limit_s: float) -> None:
        """The guest was stopped, but had written too much until then; it runs again.

        Args:
            rest_bytes: What was left then.
            downtime_limit_s: As for :meth:`after`.
        """
        self._least_rest = None
        self._fitting_passes = 0
        self._fitting_s = 0.0
        if self._no_better_s >= STUCK_S:
            self._tell_stall(rest_bytes, self._write_rate, downtime_limit_s)

    def _choose_moment(self, done: Pass, expected_s: float) -> Decision:
        """Whether another pass would make a rest that fits smaller."""
        self._fitting_passes += 1
        self._fitting_s += done.duration_s
        least = self._least_rest
        self._least_rest = done.rest_bytes if least is None else min(least, done.rest_bytes)
        is_over = self._fitting_passes > EXTRA_PASSES or self._fitting_s > EXTRA_S
        if expected_s <= TINY_REST_S or is_over:
            return Decision.SWITCH_OVER
        if least is None:
            # How it compares with the pass before it shows whether passes shrink anything.
            shrinks = done.rest_bytes <= GOOD_SHRINK * done.done_bytes
            return Decision.GO_ON if shrinks else Decision.SWITCH_OVER
        if done.rest_bytes <= GOOD_SHRINK * least or done.rest_bytes > GOOD_MOMENT * least:
            return Decision.GO_ON
        return Decision.SWITCH_OVER

    def _measure(self, done: Pass) -> None:
        if done.duration_s <= 0 or not done.done_bytes:
            return
        rate = done.done_bytes / done.duration_s
        if done.duration_s >= SURE_S or not self._last_rate:
            self._last_rate = rate
        # A short pass says little; a long one replaces what was known.
        weight = min(1.0, done.duration_s / 0.1) if self.bytes_per_s else 1.0
        self.bytes_per_s += weight * (rate - self.bytes_per_s)

    def _slow_down(self, done: Pass) -> None:
        settings = self._throttle
        if settings is None and self._dirty_limit is None:
            return
        so_far = self._period
        self._period = period = Pass(
            so_far.rest_bytes + done.rest_bytes,
            so_far.sent_bytes + done.sent_bytes,
            so_far.duration_s + done.duration_s,
            (so_far.covered_bytes or 0) + done.done_bytes,
        )
        if period.duration_s < THROTTLE_PERIOD_S:
            return
        self._period = Pass(0, 0, 0.0, 0)
        if self._dirty_limit is not None and self._dirty_limit.is_in_service:
            self.throttle_percentage = self._dirty_limit.adjust(self._write_rate)
            return
        is_high = period.rest_bytes > period.done_bytes * self._threshold / 100
        self._high_periods = self._high_periods + 1 if is_high else 0
        if self._high_periods < 2:
            return
        self._high_periods = 0
        if self._dirty_limit is not None:
            self._dirty_limit.is_in_service = True
        elif settings is not None and not self.throttle_percentage:
            self.throttle_percentage = min(settings.initial, settings.maximum)
        elif settings is not None:
            self.throttle_percentage = min(
                self.throttle_percentage + settings.increment, settings.maximum
            )

    def _look_for_stall(self, before: Pass | None, done: Pass, limit_s: float) -> None:
        rest_before = before.rest_bytes if before is not None else done.done_bytes
        is_stuck = done.rest_bytes > GOOD_SHRINK * rest_before
        elapsed_s = done.duration_s + done.waited_s
        self._stalled_s = self._stalled_s + elapsed_s if is_stuck else 0.0
        if not is_stuck:
            self._hopeless_s = 0.0
        can_slow_down = (
            self._throttle is not None and self.throttle_percentage < self._throttle.maximum
        )
        is_stalled = self._stalled_s >= STALL_S or self._no_better_s >= STUCK_S
        if not is_stalled or can_slow_down:
            if self._hopeless_s < STALL_S:
                self.stall = None
            return
        # Who writes the same pages again seems to write less.
        dirty = max(done.rest_bytes / max(elapsed_s, 1e-6), self._write_rate)
        self._tell_stall(done.rest_bytes, dirty, limit_s)

    def _note_best(self, done: Pass) -> None:
        if self._best_rest is None or done.rest_bytes < GOOD_SHRINK * self._best_rest:
            self._best_rest = done.rest_bytes
            self._no_better_s = 0.0
        else:
            self._no_better_s += done.duration_s + done.waited_s

    def _tell_stall(self, rest_bytes: int, dirty: float, limit_s: float) -> None:
        expected_s = self.expected_downtime_s(rest_bytes)
        self.stall = _stall_text(dirty, self.bytes_per_s, expected_s, limit_s, self._others)

    @property
    def _others(self) -> str:
        """What else may help and is off."""
        names = ["auto-converge"] * (self._throttle is None) + ["xbzrle"] * (not self._has_edits)
        if self._has_postcopy:
            return "migrate-start-postcopy"
        return f"turn {' or '.join([*names, 'postcopy-ram'])} on"


def _stall_text(written: float, sent: float, expected_s: float, limit_s: float, others: str) -> str:
    return (
        f"the guest writes {written / 1e6:.0f} MB/s and {sent / 1e6:.0f} MB/s are "
        f"sent: {expected_s * 1000:.0f} ms of downtime would be "
        f"needed, {limit_s * 1000:.0f} ms are allowed; raise downtime-limit or max-bandwidth, "
        f"or {others}"
    )

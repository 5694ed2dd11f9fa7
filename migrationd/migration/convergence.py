"""When a running guest is stopped, and when it is slowed down. Pure.

After each pass over the dirty pages the rest is compared with what can be sent within
``downtime-limit``. QEMU stops the guest as soon as the rest fits. Here another pass is
made while it still shrinks the rest, for every page that is not left over is downtime
saved; the guest is stopped when it does not pay any more.

Reference: meaning of ``downtime-limit``, ``cpu-throttle-*`` and ``throttle-trigger-threshold``
as in QEMU 11.1.
"""

from dataclasses import dataclass
from enum import Enum

GOOD_SHRINK = 0.7
"""Another pass pays if it leaves at most this share of the rest before."""

EXTRA_PASSES = 6
"""Most passes after the first one whose rest fits the limit."""

TINY_REST_S = 0.002
"""A rest that takes less than this is never worth another pass."""

STALL_S = 2.0
"""Passes without progress for this long are called a stall."""

MARGIN = 0.75
"""Share of the downtime limit that the rest may take: stopping, devices and start take time too."""


class Decision(Enum):
    """What to do after a pass."""

    GO_ON = "go on"
    SWITCH_OVER = "switch over"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over dirty pages.

    Attributes:
        rest_bytes: Dirty memory that the next pass, or the switchover, has to send.
        sent_bytes: Bytes that this pass sent.
        duration_s: How long it took.
    """

    rest_bytes: int
    sent_bytes: int
    duration_s: float


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

    Attributes:
        bytes_per_s: Rate that the switchover is planned with; 0 before it is known.
        throttle_percentage: Share of time that the guest has to give up.
        stall: Why the migration will not end by itself, in plain words; None if it may.
    """

    def __init__(self, throttle: ThrottleSettings | None = None) -> None:
        self._throttle = throttle
        self._before: Pass | None = None
        self._fitting_passes = 0
        self._high_passes = 0
        self._stalled_s = 0.0
        self._available_bytes_per_s = 0
        self.bytes_per_s = 0.0
        self.throttle_percentage = 0
        self.stall: str | None = None

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
        before, self._before = self._before, done
        expected_s = self.expected_downtime_s(done.rest_bytes)
        if expected_s <= MARGIN * downtime_limit_s:
            self.stall = None
            self._fitting_passes += 1
            is_better = before is None or done.rest_bytes <= GOOD_SHRINK * before.rest_bytes
            if expected_s > TINY_REST_S and is_better and self._fitting_passes <= EXTRA_PASSES:
                return Decision.GO_ON
            return Decision.SWITCH_OVER
        self._fitting_passes = 0
        self._slow_down(done)
        self._look_for_stall(before, done, downtime_limit_s)
        return Decision.GO_ON

    def expected_downtime_s(self, rest_bytes: int) -> float:
        """Time that a rest takes; infinite before the rate is known."""
        if not rest_bytes:
            return 0.0
        rate = self._available_bytes_per_s or self.bytes_per_s
        return rest_bytes / rate if rate else float("inf")

    def _measure(self, done: Pass) -> None:
        if done.duration_s <= 0 or not done.sent_bytes:
            return
        rate = done.sent_bytes / done.duration_s
        # A short pass says little; a long one replaces what was known.
        weight = min(1.0, done.duration_s / 0.1) if self.bytes_per_s else 1.0
        self.bytes_per_s += weight * (rate - self.bytes_per_s)

    def _slow_down(self, done: Pass) -> None:
        settings = self._throttle
        if settings is None:
            return
        is_high = done.rest_bytes > done.sent_bytes * settings.trigger_threshold / 100
        self._high_passes = self._high_passes + 1 if is_high else 0
        if self._high_passes < 2:
            return
        self._high_passes = 0
        if not self.throttle_percentage:
            self.throttle_percentage = min(settings.initial, settings.maximum)
        else:
            self.throttle_percentage = min(
                self.throttle_percentage + settings.increment, settings.maximum
            )

    def _look_for_stall(self, before: Pass | None, done: Pass, limit_s: float) -> None:
        rest_before = before.rest_bytes if before is not None else done.sent_bytes
        is_stuck = done.rest_bytes > GOOD_SHRINK * rest_before
        self._stalled_s = self._stalled_s + done.duration_s if is_stuck else 0.0
        can_slow_down = (
            self._throttle is not None and self.throttle_percentage < self._throttle.maximum
        )
        if self._stalled_s < STALL_S or can_slow_down:
            self.stall = None
            return
        dirty = done.rest_bytes / max(done.duration_s, 1e-6)
        self.stall = (
            f"the guest writes {dirty / 1e6:.0f} MB/s and {self.bytes_per_s / 1e6:.0f} MB/s are "
            f"sent: {self.expected_downtime_s(done.rest_bytes) * 1000:.0f} ms of downtime would be "
            f"needed, {limit_s * 1000:.0f} ms are allowed; raise downtime-limit or max-bandwidth, "
            "or turn auto-converge on"
        )

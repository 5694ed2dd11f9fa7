"""Where a workload's threads wait while the daemon holds it still."""

import threading
import time

from migrationd.errors import GuestError

_SLICE_S = 0.01
"""A throttled workload may run for this long, then rests in proportion."""


class Gate:
    """Lets threads in while it is open; closing waits until the last is out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._percentage = 0
        self.is_open = True

    def enter(self) -> None:
        """Wait until the gate is open and go in."""
        if rest_s := self.rest_s:
            time.sleep(rest_s)
        with self._changed:
            while not self.is_open:
                self._changed.wait()
            self._inside += 1

    def try_enter(self) -> bool:
        """Go in if the gate is open."""
        with self._changed:
            self._inside += self.is_open
            return self.is_open

    def leave(self) -> None:
        """Go out.

        Raises:
            GuestError: Nobody is inside.
        """
        with self._changed:
            if not self._inside:
                raise GuestError("nobody is inside: leave() without enter()")
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait until everybody is out."""
        with self._changed:
            self.is_open = False
            while self._inside:
                self._changed.wait()

    def open(self) -> None:
        """Let everybody in."""
        with self._changed:
            self.is_open = True
            self._changed.notify_all()

    def throttle(self, percentage: int) -> None:
        """Be shut for this share of the time from now on."""
        self._percentage = min(99, max(0, percentage))

    @property
    def rest_s(self) -> float:
        """Seconds that a throttled gate is still shut: after each slice, in proportion."""
        share = self._percentage / 100
        if not share:
            return 0.0
        cycle_s = _SLICE_S / (1 - share)
        at_s = time.monotonic() % cycle_s
        return cycle_s - at_s if at_s > _SLICE_S else 0.0

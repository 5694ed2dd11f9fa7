"""How much of its time a guest gives up so that it writes no faster than a limit. Pure.

Reference: ``dirty-limit``, ``vcpu-dirty-limit`` and ``set-vcpu-dirty-limit`` of QEMU, which slows
virtual CPUs down by KVM's dirty ring; a workload gives up a share of its time instead.
"""

from dataclasses import dataclass

MOST_PERCENT = 99
STEP = 0.7
"""Share of the way to the computed percentage that one look goes: rates are noisy."""


@dataclass(frozen=True, slots=True)
class DirtyLimitState:
    """What ``query-vcpu-dirty-limit`` tells, in MiB per second."""

    limit_mib_per_s: int
    current_mib_per_s: int


@dataclass(slots=True)
class DirtyLimit:
    """Follows one guest.

    Attributes:
        limit_bytes_per_s: The limit.
        is_in_service: Whether it is enforced now.
    """

    limit_bytes_per_s: int
    is_in_service: bool = False
    _percentage: float = 0.0

    def adjust(self, written_bytes_per_s: float) -> int:
        """Look at a rate that was measured since the last call.

        Returns:
            Share of its time that the guest gives up from now on, percent.
        """
        running = 1 - self._percentage / 100
        unhindered = written_bytes_per_s / running
        wanted = 0.0
        if unhindered > self.limit_bytes_per_s:
            wanted = 100 * (1 - self.limit_bytes_per_s / unhindered)
        self._percentage += STEP * (wanted - self._percentage)
        self._percentage = min(float(MOST_PERCENT), max(0.0, self._percentage))
        return round(self._percentage)

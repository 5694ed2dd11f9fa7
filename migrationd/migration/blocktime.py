"""How long a guest's threads waited for pages in postcopy. Pure: the time is handed in.

Reference: the members ``postcopy-blocktime``, ``postcopy-vcpu-*`` and ``postcopy-latency*``
of QEMU's ``query-migrate``; the threads of a workload are what virtual processors are there.
A thread is known from its first wait on.
"""

from dataclasses import dataclass, field, replace

from migrationd.migration.info import MigrationInfo
from migrationd.migration.latency import LatencyStats

_NS_PER_MS = 1_000_000


@dataclass(slots=True)
class _Thread:
    waits: int = 0
    since_ns: int = 0
    blocked_ns: int = 0
    latency: LatencyStats = field(default_factory=LatencyStats)


class Blocktime:
    """Waits of one guest; one caller at a time.

    Attributes:
        latency: Of all threads together.
        all_blocked_ns: Time in which all threads that are known waited at once.
    """

    def __init__(self) -> None:
        self.latency = LatencyStats()
        self.all_blocked_ns = 0
        self._threads: dict[int, _Thread] = {}
        self._waiting = 0
        self._all_since_ns = 0

    def begin(self, thread: int, now_ns: int) -> None:
        """A thread waits for a page; one that is not told apart from others may wait for many."""
        state = self._threads.get(thread)
        if state is None:
            if self._is_all_blocked:
                self.all_blocked_ns += now_ns - self._all_since_ns
            state = self._threads[thread] = _Thread()
        if not state.waits:
            state.since_ns = now_ns
            self._waiting += 1
            if self._is_all_blocked:
                self._all_since_ns = now_ns
        state.waits += 1

    def end(self, thread: int, began_ns: int, now_ns: int) -> None:
        """A wait that began then is over."""
        state = self._threads[thread]
        self.latency.add(now_ns - began_ns)
        state.latency.add(now_ns - began_ns)
        state.waits -= 1
        if state.waits:
            return
        if self._is_all_blocked:
            self.all_blocked_ns += now_ns - self._all_since_ns
        self._waiting -= 1
        state.blocked_ns += now_ns - state.since_ns

    @property
    def thread_blocked_ns(self) -> tuple[int, ...]:
        """Time that each thread waited, in the order of their first waits."""
        return tuple(state.blocked_ns for state in list(self._threads.values()))

    @property
    def thread_latency_ns(self) -> tuple[int, ...]:
        """Mean wait of each thread, in the same order."""
        return tuple(state.latency.mean_ns for state in list(self._threads.values()))

    @property
    def _is_all_blocked(self) -> bool:
        return 0 < self._waiting == len(self._threads)


def with_blocktime(info: MigrationInfo, blocktime: Blocktime) -> MigrationInfo:
    """A destination's answer with what its guest waited; every wait is of a known thread."""
    return replace(
        info,
        postcopy_blocktime_ms=blocktime.all_blocked_ns // _NS_PER_MS,
        postcopy_vcpu_blocktime_ms=tuple(n // _NS_PER_MS for n in blocktime.thread_blocked_ns),
        postcopy_vcpu_latency_ns=blocktime.thread_latency_ns,
        postcopy_non_vcpu_latency_ns=0,
        postcopy_latency_ns=blocktime.latency.mean_ns,
        postcopy_latency_dist=blocktime.latency.distribution(),
    )

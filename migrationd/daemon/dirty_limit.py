"""Keeps a workload's rate of writing below a limit, outside migrations as well.

Reference: ``set-vcpu-dirty-limit`` of QEMU. A workload counts as one virtual CPU, number 0.
"""

import asyncio
import logging
from collections.abc import Callable

from migrationd.clock import Clock
from migrationd.errors import GuestError, QMPError
from migrationd.guest.base import Guest, Live
from migrationd.guest.dirty import DirtyTracker
from migrationd.migration.dirty_limit import DirtyLimit, DirtyLimitState

log = logging.getLogger(__name__)

PERIOD_S = 0.25
"""How often the rate is looked at."""

NEEDS_KVM = "dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'"


class DirtyLimiter:
    """At most one limit; lives on the event loop.

    Args:
        clock: Time.
        guest: Gives the guest, or None if there is none.
        spawn: Owns the task.
    """

    def __init__(
        self,
        clock: Clock,
        guest: Callable[[], Guest | None],
        spawn: Callable[["asyncio.Future[None]"], None],
    ) -> None:
        self._clock = clock
        self._guest = guest
        self._spawn = spawn
        self._task: asyncio.Task[None] | None = None
        self._limit = DirtyLimit(0)
        self._rate = 0.0

    @property
    def state(self) -> DirtyLimitState | None:
        """Limit and rate; None without a limit."""
        if self._task is None:
            return None
        return DirtyLimitState(self._limit.limit_bytes_per_s >> 20, int(self._rate) >> 20)

    def set(self, cpu_index: int | None, mib_per_s: int) -> None:
        """Limit what the workload writes, or change the limit; 0 lifts it.

        Raises:
            QMPError: The guest is none that can be slowed down, or has no such CPU.
        """
        guest = self._guest()
        live = guest.live if guest is not None else None
        if live is None:
            raise QMPError(NEEDS_KVM)
        if cpu_index not in (None, 0, -1):
            raise QMPError("incorrect cpu index specified")
        if not mib_per_s:
            self.lift()
            return
        self._limit.limit_bytes_per_s = mib_per_s << 20
        if self._task is None:
            try:
                tracker = live.watch_writes()
            except GuestError as error:
                raise QMPError(str(error)) from error
            self._limit = DirtyLimit(mib_per_s << 20, is_in_service=True)
            self._task = asyncio.ensure_future(self._follow(live, tracker, self._limit))
            self._spawn(self._task)

    def lift(self) -> None:
        """Let the workload write as it likes; nothing if it may."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _follow(self, live: Live, tracker: DirtyTracker, limit: DirtyLimit) -> None:
        percentage = 0
        try:
            await asyncio.to_thread(tracker.start)
            begin_s = self._clock.monotonic_s()
            while True:
                await asyncio.sleep(PERIOD_S)
                written = await asyncio.to_thread(_collect_bytes, live, self._guest, tracker)
                now_s = self._clock.monotonic_s()
                self._rate, begin_s = written / (now_s - begin_s), now_s
                wanted = limit.adjust(self._rate)
                if wanted != percentage:
                    percentage = wanted
                    await asyncio.to_thread(live.throttle, percentage)
        except GuestError as error:
            log.warning("the limit of what the guest writes ends: %s", error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None
            await asyncio.shield(asyncio.to_thread(_release, live, tracker))


def _collect_bytes(live: Live, guest: Callable[[], Guest | None], tracker: DirtyTracker) -> int:
    held = guest()
    if held is None or held.live is not live:
        raise GuestError("the guest is gone")
    pages = tracker.collect()
    return sum(len(part) * block.page_size for part, block in zip(pages, held.ram, strict=True))


def _release(live: Live, tracker: DirtyTracker) -> None:
    tracker.stop()
    try:
        live.throttle(0)
    except GuestError as error:
        log.debug("the guest has its time again by itself: %s", error)

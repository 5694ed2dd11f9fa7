"""Measures how fast the guest's memory changes.

Pages are sampled twice and compared, or, with ``dirty-bitmap``, all are watched.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from migrationd.clock import Clock
from migrationd.errors import GuestError, QMPError
from migrationd.guest.base import Guest
from migrationd.guest.dirty import DirtyTracker
from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.dirty_rate import (
    DirtyRateRequest,
    DirtyRateState,
    pages_to_sample,
    rate_mib_per_s,
    rate_of_bytes,
)
from migrationd.pageops.sampling import Digests, page_digests

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sample:
    block: RamBlock
    pages: Pages
    by_contents: bool
    """Whether every page counts as its memory is; else one that is not present is zero."""
    digests: Digests


class DirtyRateMeter:
    """At most one measurement at a time; lives on the event loop.

    Args:
        clock: Time.
        guest: Gives the guest, or None if there is none.
        spawn: Owns the task of a measurement.
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
        self.state = DirtyRateState()

    def start(self, request: DirtyRateRequest) -> None:
        """Begin a measurement.

        Raises:
            QMPError: Writes of this guest cannot be tracked.
        """
        guest = self._guest()
        tracker: DirtyTracker | None = None
        if request.mode == "dirty-bitmap" and guest is not None and guest.live is not None:
            try:
                tracker = guest.live.watch_writes()
            except GuestError as error:
                raise QMPError(
                    "mode dirty-bitmap is not enabled, use other method instead."
                ) from error
        self.state = DirtyRateState("measuring", self._clock.wall_ns() // 10**9, request)
        work = self._measure(request) if tracker is None else self._watch(request, tracker)
        self._spawn(asyncio.ensure_future(work))

    async def _watch(self, request: DirtyRateRequest, tracker: DirtyTracker) -> None:
        """Count what is written to an executing guest's memory."""
        rate = None
        try:
            await asyncio.to_thread(tracker.start)
            begin_s = self._clock.monotonic_s()
            await asyncio.sleep(request.calc_time_ms / 1000)
            written_bytes = await asyncio.to_thread(tracker.peek)
            rate = rate_of_bytes(written_bytes, self._clock.monotonic_s() - begin_s)
        except GuestError as error:
            log.warning("the dirty rate cannot be measured: %s", error)
        finally:
            await asyncio.to_thread(tracker.stop)
            self.state = DirtyRateState(
                "unstarted" if rate is None else "measured",
                self.state.start_time_s,
                request,
                rate_mib_per_s=rate,
            )

    async def _measure(self, request: DirtyRateRequest) -> None:
        rate = 0
        try:
            guest = self._guest()
            begin_s = self._clock.monotonic_s()
            # With dirty-bitmap there is nothing to count: the guest does not execute.
            sample: list[_Sample] = []
            if guest is not None and request.mode == "page-sampling":
                sample = await asyncio.to_thread(_take, guest, request.sample_pages)
            elapsed_s = self._clock.monotonic_s() - begin_s
            await asyncio.sleep(max(0.0, request.calc_time_ms / 1000 - elapsed_s))
            if sample and self._guest() is guest:
                changed = await asyncio.to_thread(_count_changed, sample)
                rate = rate_mib_per_s(
                    changed,
                    sum(len(item.pages) for item in sample),
                    sum(item.block.used_length for item in sample),
                    self._clock.monotonic_s() - begin_s,
                )
        except GuestError as error:
            log.warning("the dirty rate cannot be measured: %s", error)
        finally:
            self.state = DirtyRateState(
                "measured", self.state.start_time_s, request, rate_mib_per_s=rate
            )


def _take(guest: Guest, sample_pages: int) -> list[_Sample]:
    taken = []
    is_live = guest.live is not None
    for block in guest.ram:
        count = pages_to_sample(block.used_length, block.page_count, sample_pages)
        if count:
            pages = np.array(sorted(random.sample(range(block.page_count), count)), np.int64)
            taken.append(_Sample(block, pages, is_live, _digests(block, pages, is_live)))
    return taken


def _count_changed(sample: list[_Sample]) -> int:
    return sum(
        int(np.count_nonzero(_digests(item.block, item.pages, item.by_contents) != item.digests))
        for item in sample
    )


def _digests(block: RamBlock, pages: Pages, by_contents: bool) -> Digests:
    looked_at = np.ones(len(pages), np.bool_) if by_contents else block.present[pages]
    content = block.memory.read(pages[looked_at])
    digests = np.zeros(len(pages), np.uint64)
    digests[looked_at] = page_digests(content.reshape(-1), block.page_size, np.arange(len(content)))
    return digests

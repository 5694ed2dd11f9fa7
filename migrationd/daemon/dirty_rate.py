"""Measures how fast the guest's memory changes: pages are sampled twice and compared."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from migrationd.clock import Clock
from migrationd.errors import QMPError
from migrationd.guest.base import Guest
from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.dirty_rate import (
    DirtyRateRequest,
    DirtyRateState,
    pages_to_sample,
    rate_mib_per_s,
)
from migrationd.pageops.sampling import Digests, page_digests


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
            QMPError: Writes of this guest are not logged for it.
        """
        guest = self._guest()
        if request.mode == "dirty-bitmap" and guest is not None and guest.live is not None:
            raise QMPError("mode dirty-bitmap is not enabled, use other method instead.")
        self.state = DirtyRateState("measuring", self._clock.wall_ns() // 10**9, request)
        self._spawn(asyncio.ensure_future(self._measure(request)))

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
    if by_contents:
        return page_digests(block.memory.view, block.page_size, pages)
    digests = np.zeros(len(pages), np.uint64)
    present = block.present[pages]
    digests[present] = page_digests(block.memory.view, block.page_size, pages[present])
    return digests

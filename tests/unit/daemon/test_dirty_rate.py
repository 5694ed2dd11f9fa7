"""Two looks at sampled pages, and the rate from them."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.daemon.dirty_rate import DirtyRateMeter
from migrationd.guest.base import Guest, GuestIdentity
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.migration.dirty_rate import DirtyRateRequest

PAGE = 4096
PAGES = 256


@pytest.fixture
def guest() -> ParkedGuest:
    guest = ParkedGuest.create(
        GuestIdentity(),
        [RamBlockSpec("pc.ram", PAGES * PAGE, PAGE), RamBlockSpec("empty", 0, PAGE)],
        lambda _, spec: AnonymousMemory(max(spec.used_length, PAGE), spec.page_size),
    )
    fill(guest, 1)
    return guest


def fill(guest: ParkedGuest, value: int) -> None:
    data = np.full((PAGES, PAGE), value, np.uint8)
    guest.ram[0].place_batch(np.arange(PAGES), data, is_run=True)


class SteppingClock(SystemClock):
    """A tenth of a second passes from look to look; behind the first look the guest writes."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._looks = 0

    def monotonic_s(self) -> float:
        self._looks += 1
        if self._looks == 2:
            self._write()
        return self._looks / 10


async def measure(guest: Guest | None, request: DirtyRateRequest, value: int = 1) -> DirtyRateMeter:
    def write() -> None:
        if isinstance(guest, ParkedGuest):
            fill(guest, value)

    tasks: list[asyncio.Future[None]] = []
    meter = DirtyRateMeter(SteppingClock(write), lambda: guest, tasks.append)
    assert meter.state.status == "unstarted"
    meter.start(request)
    assert meter.state.status == "measuring"
    assert meter.state.rate_mib_per_s is None
    await asyncio.gather(*tasks)
    assert meter.state.status == "measured"
    assert meter.state.start_time_s > 1_700_000_000
    return meter


SAMPLE = DirtyRateRequest(calc_time_ms=100, mode="page-sampling", sample_pages=16384)


async def test_what_changes_is_counted(guest: ParkedGuest) -> None:
    """All of 1 MiB in 0.2 s."""
    assert (await measure(guest, SAMPLE, value=2)).state.rate_mib_per_s == 5


async def test_the_same_contents_are_no_change(guest: ParkedGuest) -> None:
    assert (await measure(guest, SAMPLE)).state.rate_mib_per_s == 0


async def test_nothing_to_sample() -> None:
    assert (await measure(None, SAMPLE)).state.rate_mib_per_s == 0


async def test_no_page_is_logged_of_a_guest_that_does_not_execute(guest: ParkedGuest) -> None:
    request = DirtyRateRequest(calc_time_ms=50, mode="dirty-bitmap", sample_pages=0)
    assert (await measure(guest, request, value=3)).state.rate_mib_per_s == 0

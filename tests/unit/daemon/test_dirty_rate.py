"""Two looks at sampled pages, and the rate from them."""

import asyncio

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


async def measure(guest: Guest | None, request: DirtyRateRequest, value: int = 1) -> DirtyRateMeter:
    tasks: list[asyncio.Future[None]] = []
    meter = DirtyRateMeter(SystemClock(), lambda: guest, tasks.append)
    assert meter.state.status == "unstarted"
    meter.start(request)
    assert meter.state.status == "measuring"
    assert meter.state.rate_mib_per_s is None
    await asyncio.sleep(0.05)
    if isinstance(guest, ParkedGuest):
        fill(guest, value)
    await asyncio.gather(*tasks)
    assert meter.state.status == "measured"
    assert meter.state.start_time_s > 1_700_000_000
    return meter


# A share of 1 MiB in 0.1 s would round to nothing or to a few MiB per second.
SAMPLE = DirtyRateRequest(calc_time_ms=100, mode="page-sampling", sample_pages=16384)


async def test_what_changes_is_counted(guest: ParkedGuest) -> None:
    meter = await measure(guest, SAMPLE, value=2)
    assert meter.state.rate_mib_per_s is not None
    assert 1 <= meter.state.rate_mib_per_s <= 10


async def test_the_same_contents_are_no_change(guest: ParkedGuest) -> None:
    assert (await measure(guest, SAMPLE)).state.rate_mib_per_s == 0


async def test_nothing_to_sample() -> None:
    assert (await measure(None, SAMPLE)).state.rate_mib_per_s == 0


async def test_no_page_is_logged_of_a_guest_that_does_not_execute(guest: ParkedGuest) -> None:
    request = DirtyRateRequest(calc_time_ms=50, mode="dirty-bitmap", sample_pages=0)
    assert (await measure(guest, request, value=3)).state.rate_mib_per_s == 0

"""When a running guest is stopped, and that it goes on if that was too early."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest.memory import AnonymousMemory, Pages
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.convergence import Convergence
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.live_save import UNACKNOWLEDGED, LiveSaver

PAGE = 4096
PAGES = 1000
PAGE_S = 0.001
"""Time that a page takes on the wire."""


class Guest:
    """Writes as many pages as the list says, each time that it is asked."""

    def __init__(self, *written: int) -> None:
        self.written = list(written)
        self.is_running = True
        self.calls: list[str] = []
        self.tracker = self

    def start(self) -> bool:
        self.is_running = True
        self.calls.append("start")
        return True

    def stop(self) -> bool:
        self.is_running = False
        self.calls.append("stop")
        return True

    def run_state_held(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def collect(self) -> list[Pages]:
        count = self.written.pop(0)
        if count < 0:
            raise GuestError("gone")
        return [np.arange(count)]

    def peek(self) -> int:
        return 0

    def touched_runs(self, block: RamBlock) -> Pages:
        return np.array([[0, block.page_count]], np.int64)

    def know_present(self) -> None:
        self.calls.append("know")

    def throttle(self, percentage: int) -> None:
        self.calls.append(f"throttle {percentage}")

    def save_devices(self, *, was_running: bool) -> None:
        raise AssertionError("not here")


class Line:
    """A saver that takes time, and is its own clock."""

    def __init__(self, stats: OutgoingStats) -> None:
        self.now_s = 0.0
        self.stats = stats
        self.sent: list[int] = []
        self.lag_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ns(self) -> int:
        return 0

    def wait(self, delay_s: float) -> None:
        self.now_s += delay_s

    def catch_up(self) -> None:
        self.now_s += self.lag_s

    def begin_parts(self) -> None:
        self.sent.append(0)

    def end_parts(self) -> None:
        pass

    def send(self, block: RamBlock, pages: Pages, *, is_zero: bool) -> None:
        self.sent[-1] += len(pages)
        self.now_s += len(pages) * PAGE_S
        self.stats.sent(len(pages) * PAGE, normal=len(pages))


@pytest.fixture
def block() -> Iterator[RamBlock]:
    block = RamBlock(RamBlockSpec("ram", PAGES * PAGE, PAGE), AnonymousMemory(PAGES * PAGE, PAGE))
    block.memory.view[::PAGE] = 1
    yield block
    block.memory.close()


def saver(
    guest: Guest, block: RamBlock, agrees: Callable[[], bool] = lambda: True
) -> tuple[LiveSaver, Line]:
    stats = OutgoingStats(page_size=PAGE, total_bytes=PAGES * PAGE)
    line = Line(stats)
    live_saver = LiveSaver(
        line, guest, [block], Convergence(), stats=stats, clock=line,  # type: ignore[arg-type]
        downtime_limit_s=lambda: 0.1, available_bytes_per_s=lambda: 0, may_switch_over=agrees,
        wait_for_peer=line.catch_up, on_pass=lambda: None, wait=line.wait,
    )  # fmt: skip
    return live_saver, line


def test_passes_go_on_while_they_shrink_what_is_left(block: RamBlock) -> None:
    guest = Guest(400, 60, 20, 20, 5)
    live_saver, line = saver(guest, block)
    live_saver.converge()
    assert line.sent == [PAGES, 400, 60, 20]
    assert line.stats.expected_downtime_ms(300) == 20
    assert live_saver.stop()
    assert guest.calls == ["start", "stop"]


def test_a_guest_that_wrote_too_much_until_it_stood_goes_on(block: RamBlock) -> None:
    guest = Guest(20, 20, 500, 60, 1, 1, 0)
    live_saver, line = saver(guest, block)
    live_saver.converge()
    assert not live_saver.stop(), "500 pages would be 500 ms"
    assert guest.is_running
    live_saver.converge()
    assert line.sent == [PAGES, 20, 500, 60]
    assert live_saver.stop()
    assert not guest.is_running
    live_saver.finish()
    assert line.sent[-1] == 1
    assert line.stats.remaining_bytes == 0


def test_a_guest_that_is_lost_while_it_stands_is_let_go_on(block: RamBlock) -> None:
    guest = Guest(1, -1)
    live_saver, _ = saver(guest, block)
    live_saver.converge()
    with pytest.raises(GuestError, match="gone"):
        live_saver.stop()
    assert guest.is_running


def test_what_a_postcopy_leaves_is_known_before_the_guest_stops(block: RamBlock) -> None:
    guest = Guest(400, 3)
    live_saver, line = saver(guest, block)
    is_wanted: list[bool] = []
    live_saver._should_stop = lambda: bool(is_wanted)
    live_saver._on_pass = lambda: is_wanted.append(True)
    live_saver.converge()
    block.present[:] = False
    line.lag_s = 1.0
    begin_s = line.now_s
    assert live_saver.stop()
    assert line.now_s == begin_s + 1, "the destination took in what was sent"
    live_saver.leave_rest()
    assert guest.calls == ["start", "know", "stop"]
    assert np.flatnonzero(block.present).tolist() == [0, 1, 2], "written since it was known"


def test_it_does_not_end_before_the_destination_agrees(block: RamBlock) -> None:
    told: list[str | None] = []
    guest = Guest(*[0] * 6)

    def agrees() -> bool:
        told.append(live_saver.stall)
        return len(told) == 4

    def look(delay_s: float) -> None:
        told_while_it_waits.append(live_saver.stall)

    told_while_it_waits: list[str | None] = []
    live_saver, line = saver(guest, block, agrees)
    live_saver._wait = look
    live_saver.converge()
    assert told_while_it_waits == [UNACKNOWLEDGED] * 3
    assert live_saver.stall is None
    assert line.sent == [PAGES, 0, 0, 0]


@pytest.mark.parametrize(("lag_s", "passes"), [(0.0, [400, 60]), (1.0, [400, 60, 58])])
def test_a_destination_that_lags_behind_counts_as_a_slow_line(
    block: RamBlock, lag_s: float, passes: list[int]
) -> None:
    guest = Guest(400, 60, 58, 0)
    live_saver, line = saver(guest, block)
    line.lag_s = lag_s
    live_saver.converge()
    assert line.sent == [PAGES, *passes]

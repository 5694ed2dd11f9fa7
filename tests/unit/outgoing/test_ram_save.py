"""Zero pages of a single connection: as records, or whole."""

import socket
import threading

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.codec.records import MixedBatch, PageBatch, ZeroBatch
from migrationd.codec.stream import StreamDecoder
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.ram_save import RamSaver
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

PAGE = 4096
PAGES = 700


def never(_: float) -> None:
    raise AssertionError("there is no limit to wait for")


@pytest.mark.parametrize("detects_zeros", [True, False])
def test_zero_pages_go_as_records_or_whole(detects_zeros: bool) -> None:
    block = RamBlock(RamBlockSpec("ram", PAGES * PAGE, PAGE), AnonymousMemory(PAGES * PAGE, PAGE))
    # What lies under a page that is not present says nothing.
    block.memory.view[:] = 7
    block.present[300:320] = True
    stats = OutgoingStats(page_size=PAGE, total_bytes=PAGES * PAGE)
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    saver = RamSaver(
        channel, [block], section_id=1, has_footers=True, page_size=PAGE, stats=stats,
        limiter=RateLimiter(0), clock=SystemClock(), wait=never, detects_zeros=detects_zeros,
    )  # fmt: skip

    def send() -> None:
        channel.send(bytes.fromhex("5145564d00000003") + saver.setup_bytes())
        saver.save_all()
        channel.close()

    thread = threading.Thread(target=send)
    thread.start()
    decoder = StreamDecoder()
    whole: dict[int, int] = {}
    zero: set[int] = set()
    with theirs:
        while data := theirs.recv(1 << 20):
            decoder.feed(data)
            while (record := decoder.next_record()) is not None:
                assert not isinstance(record, MixedBatch)
                if isinstance(record, PageBatch):
                    pairs = zip(record.pages.tolist(), record.data, strict=True)
                    whole |= {page: int(np.unique(content).item()) for page, content in pairs}
                elif isinstance(record, ZeroBatch):
                    zero |= set(record.pages.tolist())
    thread.join(10)
    present = set(range(300, 320))
    absent = set(range(PAGES)) - present
    assert {page for page, value in whole.items() if value == 7} == present
    if detects_zeros:
        assert zero == absent
        assert set(whole) == present
    else:
        assert not zero
        assert {page for page, value in whole.items() if value == 0} == absent
    assert stats.normal_pages == len(whole)
    assert stats.duplicate_pages == len(zero)
    block.memory.close()


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        """Now."""
        return self.now_s

    def monotonic_ns(self) -> int:
        """Now."""
        return int(self.now_s * 1e9)

    def wall_ns(self) -> int:
        """Now."""
        return self.monotonic_ns()


def test_records_of_zero_pages_keep_to_the_rate_and_stop_when_told() -> None:
    """Ten times more records than a second may have; then postcopy is asked for."""
    rate = 20_000
    pages = 10 * rate // 9
    block = RamBlock(RamBlockSpec("ram", pages * PAGE, PAGE), AnonymousMemory(pages * PAGE, PAGE))
    clock = Clock()
    end_s = clock.now_s + 2.0
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    waits: list[float] = []

    def wait(delay_s: float) -> None:
        waits.append(delay_s)
        clock.now_s += delay_s

    stats = OutgoingStats(page_size=PAGE, total_bytes=pages * PAGE)
    saver = RamSaver(
        channel, [block], section_id=1, has_footers=True, page_size=PAGE, stats=stats,
        limiter=RateLimiter(rate), clock=clock, wait=wait,
        should_stop=lambda: clock.now_s >= end_s,
    )  # fmt: skip
    sizes: list[int] = []

    def read() -> None:
        while data := theirs.recv(1 << 20):
            sizes.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    with theirs:
        saver.save_all()
        channel.close()
        reader.join(10)
    assert clock.now_s < end_s + max(waits)
    assert 1.9 * rate < sum(sizes) < 2.1 * rate

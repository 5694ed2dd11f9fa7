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

"""Passes of a live guest with XBZRLE, decoded by our own destination."""

import socket
import threading

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.codec.records import RamBlockList
from migrationd.codec.stream import StreamDecoder
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.loader import Pause, StreamLoader
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.ram_save import RamSaver
from migrationd.outgoing.xbzrle_save import XbzrleSaver
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

PAGE = 4096
SIZES = {"a": 300, "b": 70}
HEADER = bytes.fromhex("5145564d00000003")


def blocks() -> list[RamBlock]:
    return [
        RamBlock(RamBlockSpec(name, count * PAGE, PAGE), AnonymousMemory(count * PAGE, PAGE))
        for name, count in SIZES.items()
    ]


class Guest:
    """Two blocks whose pages are written between passes, as they must arrive."""

    def __init__(self) -> None:
        self.blocks = blocks()
        self.random = np.random.default_rng(5)
        for block in self.blocks:
            self.rows(block)[::3] = 1
            self.rows(block)[::3] = self.random.integers(0, 256, self.rows(block)[::3].shape)

    @staticmethod
    def rows(block: RamBlock) -> np.ndarray:
        return block.memory.view.reshape(-1, PAGE)

    def write(self, block: RamBlock) -> np.ndarray:
        """Write some pages in every way there is; returns their numbers."""
        rows = self.rows(block)
        pages = np.sort(self.random.permutation(len(rows))[: len(rows) // 2])
        rows[pages[0::5], :9] += 1
        rows[pages[1::5], 4090:] ^= 0x11
        rows[pages[2::5]] = self.random.integers(0, 256, rows[pages[2::5]].shape)
        rows[pages[3::5]] = 0
        return pages

    def send(self, saver: XbzrleSaver, pages: dict[str, np.ndarray] | None) -> None:
        saver.begin_parts()
        for block in self.blocks:
            wanted = np.arange(block.page_count) if pages is None else pages[block.idstr]
            is_zero = ~self.rows(block)[wanted].any(axis=1)
            saver.send(block, wanted[is_zero], is_zero=True)
            saver.send(block, wanted[~is_zero], is_zero=False)
        saver.end_parts()


@pytest.mark.parametrize("rate", [0, 40 << 20])
@pytest.mark.parametrize("cache_pages", [1, 64, 1024])
def test_every_pass_arrives(cache_pages: int, rate: int) -> None:
    guest = Guest()
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    stats = OutgoingStats(page_size=PAGE, total_bytes=sum(SIZES.values()) * PAGE)
    waited = threading.Event()
    ram = RamSaver(
        channel, guest.blocks, section_id=1, has_footers=True, page_size=PAGE, stats=stats,
        limiter=RateLimiter(rate), clock=SystemClock(), wait=waited.wait,
    )  # fmt: skip
    size = cache_pages * PAGE
    saver = XbzrleSaver(ram, guest.blocks, page_size=PAGE, cache_bytes=lambda: size, stats=stats)
    incoming = Channel(theirs.detach())
    loader = StreamLoader(incoming, StreamDecoder(), lambda: None)
    arrived = blocks()

    def receive() -> None:
        while (result := loader.step()) is not Pause.FINISHED:
            if isinstance(result, RamBlockList):
                loader.use_blocks(arrived)

    thread = threading.Thread(target=receive)
    thread.start()
    channel.send(HEADER + saver.setup_bytes())
    guest.send(saver, None)
    for number in range(6):
        pages = {block.idstr: guest.write(block) for block in guest.blocks}
        guest.send(saver, pages)
        if number == 3:
            size *= 2
    channel.send(saver.end_bytes() + b"\0")
    channel.shutdown()
    thread.join(20)
    assert not thread.is_alive()
    channel.close()
    incoming.close()
    for ours_block, theirs_block in zip(guest.blocks, arrived, strict=True):
        assert (Guest.rows(ours_block) == Guest.rows(theirs_block)).all()
    told = stats.xbzrle
    assert told is not None
    assert told.cache_size == size
    if cache_pages > sum(SIZES.values()):
        assert told.cache_miss > 0, "after it was resized it was empty"
        assert told.pages > 300
        assert told.encoding_rate > 2
    assert stats.transferred_bytes > 0
    for block in (*guest.blocks, *arrived):
        block.memory.close()

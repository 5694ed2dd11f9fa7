"""Pages that are deflated one by one: what a reader makes of them."""

import os
import socket
import threading

import numpy as np

from migrationd.clock import SystemClock
from migrationd.codec.ram import inflate_page
from migrationd.codec.records import (
    CompressedPage,
    MixedBatch,
    PageBatch,
    RamBlockList,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.compress_save import CompressSaver
from migrationd.outgoing.ram_save import RamSaver
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter

PAGE = 4096
PAGES = 3000


def never(_: float) -> None:
    raise AssertionError("there is no limit to wait for")


def make_block(name: str, random: range, text: range) -> RamBlock:
    block = RamBlock(RamBlockSpec(name, PAGES * PAGE, PAGE), AnonymousMemory(PAGES * PAGE, PAGE))
    pages = block.memory.view.reshape(PAGES, PAGE)
    for page in random:
        pages[page] = np.frombuffer(os.urandom(PAGE), np.uint8)
    for page in text:
        pages[page] = page % 251
    block.present[[*random, *text]] = True
    return block


def test_pages_come_back_and_large_ones_go_plainly() -> None:
    # The first block begins with a page that gets smaller, the second with one that does not.
    blocks = [
        make_block("a", range(2000, 2010), range(5, 1500)),
        make_block("b", range(3), range(10, 20)),
        make_block("empty", range(0), range(0)),
        # Its memory is in a file that both ends share: none of it goes.
        make_block("elsewhere", range(0), range(0)),
    ]
    blocks[3].is_elsewhere = True
    stats = OutgoingStats(page_size=PAGE, total_bytes=3 * PAGES * PAGE)
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    ram = RamSaver(
        channel, blocks, section_id=1, has_footers=True, page_size=PAGE, stats=stats,
        limiter=RateLimiter(0), clock=SystemClock(), wait=never,
    )  # fmt: skip
    saver = CompressSaver(ram, blocks, page_size=PAGE, level=1)

    def send() -> None:
        channel.send(bytes.fromhex("5145564d00000003") + saver.setup_bytes())
        saver.save_all()
        channel.send(saver.end_bytes())
        channel.close()

    thread = threading.Thread(target=send)
    thread.start()
    got: dict[tuple[int, int], bytes] = {}
    deflated = 0
    zero = 0
    decoder = StreamDecoder()
    with theirs:
        while data := theirs.recv(1 << 20):
            decoder.feed(data)
            while (record := decoder.next_record()) is not None:
                match record:
                    case CompressedPage():
                        deflated += 1
                        page = inflate_page(record.compressed, PAGE)
                        assert (record.block, record.page) not in got
                        got[record.block, record.page] = page
                    case PageBatch():
                        for number, content in zip(record.pages.tolist(), record.data, strict=True):
                            got[record.block, number] = bytes(content)
                    case ZeroBatch():
                        zero += len(record.pages)
                    case RamBlockList():
                        assert len(record.blocks) == 4
                    case _:
                        assert not isinstance(record, MixedBatch)
    thread.join(10)
    sent = {(i, int(p)) for i, b in enumerate(blocks) for p in np.flatnonzero(b.present)}
    assert got.keys() == sent
    for (index, page), content in got.items():
        assert content == blocks[index].page(page).tobytes()
    # All but the random ones and those that name their block.
    assert deflated == 1495 + 10 - 1
    assert zero == 3 * PAGES - len(sent)
    assert stats.normal_pages == len(sent)
    assert stats.duplicate_pages == zero
    for block in blocks:
        block.memory.close()

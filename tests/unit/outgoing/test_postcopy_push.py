"""The push of the postcopy phase onto a real socket."""

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.codec.constants import RAM_SAVE_FLAG_CONTINUE
from migrationd.errors import ChannelClosed
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.postcopy_pacer import GivesWay, Pacer, Shares
from migrationd.outgoing.postcopy_schedule import Batch, BlockPages, PageSchedule
from migrationd.outgoing.postcopy_server import Push, RequestLog
from migrationd.outgoing.postcopy_writer import PageWriter
from migrationd.transport.channel import Channel

PAGE = 4096
PAGES = 64
_NAME_BYTES = 2


def numbered_block() -> RamBlock:
    """A block ``m`` of which each page begins with its number and one."""
    size = PAGES * PAGE
    block = RamBlock(RamBlockSpec("m", size, PAGE), AnonymousMemory(size, PAGE))
    block.memory.view[::PAGE] = np.arange(PAGES, dtype=np.uint8) + 1
    block.present[:] = True
    return block


def take_pages(there: socket.socket, count: int) -> list[int]:
    """The next pages that arrive, each with the content that belongs to it."""
    return [_take_page(there) for _ in range(count)]


def _take_page(there: socket.socket) -> int:
    word = int.from_bytes(_take(there, 8), "big")
    if not word & RAM_SAVE_FLAG_CONTINUE:
        assert _take(there, _NAME_BYTES) == b"\1m"
    assert _take(there, PAGE)[0] == word // PAGE + 1
    return word // PAGE


def _take(there: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = there.recv(size - len(data))
        assert part, "the push ended too soon"
        data += part
    return data


class Pushed:
    """A push of one block ``m``, and the destination's end of its socket."""

    def __init__(self, learned: list[int], bytes_per_s: int) -> None:
        block = numbered_block()
        here, self.there = socket.socketpair()
        self.there.settimeout(20)
        self.channel = Channel(here.detach())
        self.schedule = PageSchedule([BlockPages("m", block.present)])
        self.schedule.push_first([Batch(0, np.array(learned, np.int64))] if learned else [])
        writer = PageWriter(self.channel, [block], self.schedule, PAGE)
        writer.open(b"")
        self.stop = threading.Event()
        self.errors: list[Exception] = []
        stats = OutgoingStats(PAGE, PAGES * PAGE)
        shares = Shares(has_own_channel=False)
        self._push = Push(
            writer, self.schedule, stats, Pacer(bytes_per_s), GivesWay(0),
            RequestLog(), SystemClock(), self.stop, shares=shares, with_zeros=False,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._push.run()
        except ChannelClosed as error:
            self.errors.append(error)

    def pages(self, count: int) -> list[int]:
        """The next pages that arrive."""
        return take_pages(self.there, count)

    def close(self) -> None:
        """End the push, however far it came."""
        self.stop.set()
        self.channel.shutdown()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.channel.close()
        self.there.close()


@pytest.fixture
def pushed(request: pytest.FixtureRequest) -> Iterator[Pushed]:
    """A push with the parameters of the test."""
    pushed = Pushed(*request.param)
    yield pushed
    pushed.close()


@pytest.mark.parametrize("pushed", [([9, 3, 30, 4, 11], 1)], indirect=True)
def test_learned_pages_are_exempt_from_the_limit(pushed: Pushed) -> None:
    """At a byte per second the second of them would come after an hour, one at a time."""
    assert pushed.pages(5) == [9, 3, 30, 4, 11]
    assert pushed.pages(1) == [0], "what they sent is no debt of the others"
    pushed.there.settimeout(0.3)
    with pytest.raises(TimeoutError):
        pushed.pages(1)
    assert pushed.schedule.remaining_pages == PAGES - 6
    pushed.stop.set()
    pushed.thread.join(20)
    assert pushed.errors


@pytest.mark.parametrize("pushed", [([9], 0)], indirect=True)
def test_without_a_limit_all_pages_come_once(pushed: Pushed) -> None:
    assert pushed.pages(1) == [9]
    rest = pushed.pages(PAGES - 1)
    assert rest == [page for page in range(PAGES) if page != 9]
    pushed.thread.join(20)
    assert not pushed.errors
    assert pushed.schedule.remaining_pages == 0


def test_a_batch_that_was_broken_off_goes_on_with_its_own_pages() -> None:
    block = numbered_block()
    here, there = socket.socketpair()
    there.settimeout(20)
    channel = Channel(here.detach())
    schedule = PageSchedule([BlockPages("m", block.present)])
    writer = PageWriter(channel, [block], schedule, PAGE)
    writer.open(b"")
    with there:
        batch = schedule.next_batch(32)
        assert batch is not None
        assert writer.push(batch, 4)[0] == 4
        for page in (40, 8):
            assert writer.answer_singles([(0, page)])[0] == [(0, page)]
            schedule.requested(0, page, 1)
            schedule.broken_off(batch)
            walk = schedule.next_batch(4)
            assert walk is not None
            assert walk is not batch
            assert writer.push(walk, 4)[0] == 4
            schedule.broken_off(walk)
            assert walk.walk is not None
            walk.walk.left = 0
        assert schedule.next_batch(32) is batch
        assert [writer.push(batch, count)[0] for count in (4, 8, 16)] == [0, 7, 16]
        sent = [*range(4), 40, *range(41, 45), 8, 7, 6, 5, 4, *range(9, 32)]
        assert take_pages(there, len(sent)) == sent
    channel.close()


def test_requests_that_come_together_are_answered_in_one_write() -> None:
    block = numbered_block()
    block.present[5] = False
    here, there = socket.socketpair()
    channel = Channel(here.detach())
    schedule = PageSchedule([BlockPages("m", block.present)])
    writer = PageWriter(channel, [block], schedule, PAGE)
    with there:
        assert writer.answer_singles([(0, 3)]) == ([], 0), "nothing may go yet"
        writer.open(b"")
        assert schedule.claim_page(0, 7)
        answered, size = writer.answer_singles([(0, 9), (0, 5), (0, 7), (0, 9), (0, 3)])
        assert answered == [(0, 9), (0, 5), (0, 3)]
        data = there.recv(1 << 16, socket.MSG_WAITALL | socket.MSG_DONTWAIT)
        assert len(data) == size
        words = [int.from_bytes(data[at : at + 8], "big") for at in (0, 10 + PAGE, 10 + PAGE + 9)]
        assert words == [9 * PAGE | 8, 5 * PAGE | 0x22, 3 * PAGE | 0x28], "named once"
        assert schedule.remaining_pages == PAGES - 1 - 3
    channel.close()

"""Page requests as they come from a real socket, and their answers."""

import socket
from collections.abc import Iterator

import pytest

from migrationd.codec.return_path import (
    Pong,
    RequestPages,
    ReturnPathMessage,
    Shut,
    encode_request,
    encode_return_path,
)
from migrationd.migration.latency import LatencyStats
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.postcopy_schedule import BlockPages, PageSchedule
from migrationd.outgoing.postcopy_server import ANSWERED_AT_ONCE, RequestLog, RequestServer
from migrationd.outgoing.postcopy_writer import PageWriter
from migrationd.transport.channel import Channel
from tests.unit.outgoing.test_postcopy_push import PAGE, PAGES, numbered_block, take_pages


class Served:
    """A server of one block ``m``, and the destination's ends of its two channels."""

    def __init__(self) -> None:
        block = numbered_block()
        here, self.there = socket.socketpair()
        preempt, self.pages = socket.socketpair()
        self.channels = [Channel(here.detach()), Channel(preempt.detach())]
        self.schedule = PageSchedule([BlockPages("m", block.present)])
        self.stats = OutgoingStats(PAGE, PAGES * PAGE)
        self.latency = LatencyStats()
        self.log = RequestLog()
        self.messages: list[ReturnPathMessage] = []
        self.server = RequestServer(
            self.channels[0], [block], self.schedule, self.stats, self.latency, self.log,
            bitmap_limit_bytes=0, on_message=self.messages.append, may_end=lambda: True,
        )  # fmt: skip
        self.server.writer = PageWriter(self.channels[1], [block], self.schedule, PAGE)
        self.server.writer.open(b"")

    def close(self) -> None:
        """Give everything back."""
        for channel in self.channels:
            channel.close()
        self.there.close()
        self.pages.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_requests_that_come_together_are_answered_in_their_order(served: Served) -> None:
    first = encode_return_path(RequestPages(9 * PAGE, PAGE, "m"))
    singles = [*range(20, 20 + ANSWERED_AT_ONCE), 3, 3]
    many = encode_request(30 * PAGE, 2 * PAGE)
    data = first + b"".join(encode_request(page * PAGE, PAGE) for page in singles)
    data += encode_return_path(Pong(7)) + encode_request(9 * PAGE, PAGE)
    data += encode_request(4 * PAGE, PAGE) + many + encode_request(5 * PAGE, PAGE)
    served.there.sendall(data + encode_return_path(Shut(0)))
    served.server.run()
    expected = [9, *singles[:-1], 4, 30, 31, 5]
    assert take_pages(served.pages, len(expected)) == expected
    assert served.messages == [Pong(7)]
    assert served.stats.postcopy_requests == 1 + len(singles) + 4
    assert served.latency.count == len(expected) - 1, "two pages of one request"
    assert served.schedule.remaining_pages == PAGES - len(expected)
    assert served.log.turns % 2 == 0


def test_a_destination_that_has_all_it_needs_may_have_closed_the_channel(served: Served) -> None:
    served.pages.close()
    data = encode_return_path(RequestPages(0, PAGE, "m")) + encode_request(0, 2 * PAGE)
    served.there.sendall(data + encode_return_path(Shut(0)))
    served.server.run()
    assert served.latency.count == 0

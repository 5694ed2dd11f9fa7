"""Faults are asked for and answered by one thread; the workload is this process."""

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrationd.codec.records import RamBlockEntry
from migrationd.codec.urgent import UrgentDecoder
from migrationd.errors import ChannelClosed, GuestError, MigrationdError, StreamCorrupt
from migrationd.incoming.missing_pages import MissingPages, Wanted
from migrationd.incoming.urgent_pages import UrgentPages
from migrationd.transport.channel import Channel
from tests.support.deadline import wait_until
from tests.unit.guest.test_workload_block import PAGE, PAGES, Here

EOS = (0x10).to_bytes(8, "big")


def record(page: int) -> bytes:
    """An urgent page that is full of its number."""
    return (page * PAGE | 8).to_bytes(8, "big") + b"\x04heap" + bytes([page % 255 + 1]) * PAGE


class Watched:
    """Memory that is watched, its source, and the channel of urgent pages."""

    def __init__(self) -> None:
        self.here = Here()
        self.asked: list[int] = []
        self.errors: list[MigrationdError] = []
        self.missing = MissingPages(self.here.faults, [self.here.block], -1, self.errors.append)
        self.peer, ours = socket.socketpair()
        self.channel = Channel(ours.detach())
        self.pages = self._pages(b"")
        self.threads: set[int] = set()
        place = self.here.block.place_page

        def placed(page: int, source: int) -> None:
            self.threads.add(threading.get_native_id())
            place(page, source)

        self.here.block.place_page = placed  # type: ignore[method-assign]

    def _pages(self, data: bytes) -> UrgentPages:
        decoder = UrgentDecoder([RamBlockEntry("heap", PAGES * PAGE)], PAGE)
        return UrgentPages(self.channel, decoder, [self.here.block], data)

    def ask(self, wanted: Sequence[Wanted]) -> None:
        """Remember what was asked for."""
        self.asked.extend(page for _, page in wanted)

    def start(self) -> None:
        """Watch and ask."""
        self.missing.start()
        self.missing.connect(self.ask)

    def serve(self) -> None:
        """What the thread of a preempt channel does."""
        self.missing.serve(self.pages)
        self.pages.run()

    def close(self) -> None:
        """Give everything back."""
        self.missing.stop()
        self.channel.close()
        self.peer.close()
        self.here.close()


@pytest.fixture
def watched() -> Iterator[Watched]:
    try:
        made = Watched()
    except GuestError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    made = ThreadPoolExecutor(1)
    yield made
    made.shutdown(wait=False)


def test_urgent_pages_are_placed_where_faults_are_read(
    watched: Watched, pool: ThreadPoolExecutor
) -> None:
    watched.start()
    serving = pool.submit(watched.serve)
    for page in (9, 4, 200):
        result = watched.here.read(page)
        wait_until(lambda page=page: page in watched.asked, "the question")
        watched.peer.sendall(record(page))
        assert result() == bytes([page % 255 + 1]) * PAGE
    wait_until(lambda: not watched.missing.waiting, "nobody waits")
    watched.peer.sendall(EOS)
    serving.result(5)
    assert watched.asked == [9, 4, 200]
    assert len(watched.threads) == 1
    assert not watched.errors
    # Faults are read as before.
    result = watched.here.read(77)
    wait_until(lambda: 77 in watched.asked, "the question")
    watched.missing.stop()
    assert result() == bytes(PAGE)


def test_a_page_in_pieces_and_several_at_once(watched: Watched, pool: ThreadPoolExecutor) -> None:
    watched.start()
    serving = pool.submit(watched.serve)
    results = [watched.here.read(page) for page in (1, 2, 3)]
    wait_until(lambda: len(watched.asked) == 3, "the questions")
    data = record(1) + record(2) + record(3)
    watched.peer.sendall(data[:5000])
    assert results[0]() == bytes([2]) * PAGE
    watched.peer.sendall(data[5000:])
    assert [result() for result in results[1:]] == [bytes([3]) * PAGE, bytes([4]) * PAGE]
    watched.peer.close()
    serving.result(5)


def test_what_is_no_page_is_told_to_who_waits(watched: Watched, pool: ThreadPoolExecutor) -> None:
    watched.start()
    serving = pool.submit(watched.serve)
    watched.peer.sendall((0x40).to_bytes(8, "big"))
    with pytest.raises(StreamCorrupt):
        serving.result(5)
    assert not watched.errors
    result = watched.here.read(5)
    wait_until(lambda: watched.asked == [5], "faults are read as before")
    watched.missing.stop()
    assert result() == bytes(PAGE)


def test_a_shutdown_ends_it(watched: Watched, pool: ThreadPoolExecutor) -> None:
    watched.start()
    serving = pool.submit(watched.serve)
    watched.channel.shutdown()
    with pytest.raises(ChannelClosed, match="was shut down"):
        serving.result(5)


def test_who_waits_for_a_channel_goes_on_when_nothing_is_watched(
    watched: Watched, pool: ThreadPoolExecutor
) -> None:
    watched.start()
    serving = pool.submit(watched.missing.serve, watched.pages)
    watched.missing.stop()
    serving.result(5)
    assert not watched.pages.is_ended
    watched.missing.serve(watched.pages)  # returns at once


def test_a_source_that_answers_nothing_is_not_asked_for_ever(
    watched: Watched, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrationd.incoming.missing_pages._ASKED_MAX", 3)
    watched.start()
    serving = pool.submit(watched.serve)
    results = []
    for page in range(5):
        results.append(watched.here.read(page))
        wait_until(lambda page=page: page in watched.asked or page > 2, "the question")
    assert watched.missing.waiting == 3
    watched.peer.sendall(record(0))
    wait_until(lambda: len(watched.asked) > 3, "the next question")
    for page in (1, 2):
        watched.peer.sendall(record(page))
    wait_until(lambda: len(watched.asked) == 5, "the last question")
    for page in (3, 4):
        watched.peer.sendall(record(page))
    assert [result()[0] for result in results] == [1, 2, 3, 4, 5]
    watched.peer.sendall(EOS)
    serving.result(5)

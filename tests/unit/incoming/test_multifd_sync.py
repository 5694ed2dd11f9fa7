"""Threads that meet at the marks."""

import threading
import time

import pytest

from migrationd.errors import ChannelClosed, StreamCorrupt, StreamTruncated
from migrationd.incoming.multifd_sync import SyncPoints
from tests.support.deadline import wait_until

WAIT_S = 10


def channel(points: SyncPoints, number: int, log: list[str], rounds: int) -> threading.Thread:
    def run() -> None:
        for turn in range(rounds):
            log.append(f"data {turn}")
            if not points.reach(number):
                return
        points.end(number)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_no_channel_overtakes_a_mark_and_no_mark_a_channel() -> None:
    points = SyncPoints(3)
    log: list[str] = []
    threads = [channel(points, number, log, 20) for number in range(3)]
    for turn in range(20):
        points.pass_mark()
        assert log.count(f"data {turn}") == 3
        assert log.count(f"data {turn + 2}") == 0
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_channel_stays_at_its_sync() -> None:
    points = SyncPoints(2)
    log: list[str] = []
    threads = [channel(points, 0, log, 2)]
    wait_until(lambda: len(log) > 0, "that it comes to its sync")
    time.sleep(0.05)
    assert log == ["data 0"]
    threads.append(channel(points, 1, log, 2))
    points.pass_mark()
    points.pass_mark()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(log) == ["data 0", "data 0", "data 1", "data 1"]


def test_a_channel_that_ends_too_early_ends_the_wait() -> None:
    points = SyncPoints(2)
    thread = channel(points, 0, [], 1)
    points.end(1)
    with pytest.raises(StreamTruncated, match=r"before its SYNC 1 .*channel 1"):
        points.pass_mark()
    points.release()
    thread.join(WAIT_S)


def test_the_first_failure_counts_and_wakes_the_main_stream() -> None:
    points = SyncPoints(2)
    timer = threading.Timer(0.05, points.fail, [StreamCorrupt("first")])
    timer.start()
    with pytest.raises(StreamCorrupt, match="first"):
        points.pass_mark()
    points.fail(StreamCorrupt("second"))
    assert str(points.error) == "first"
    timer.join(WAIT_S)


def test_the_end_lets_everybody_go() -> None:
    points = SyncPoints(2)
    thread = channel(points, 0, [], 5)
    timer = threading.Timer(0.05, points.release)
    timer.start()
    with pytest.raises(ChannelClosed):
        points.pass_mark()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    # What fails while it is torn down is no failure of the migration.
    points.fail(StreamCorrupt("late"))
    assert points.error is None
    timer.join(WAIT_S)

"""What goes back to a source."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrationd.codec.return_path import Pong, ReturnPathDecoder, Shut
from migrationd.errors import StreamUnsupported
from migrationd.incoming.return_path import ReturnPath
from migrationd.transport.channel import Channel

ANSWERS = 500
THREADS = 4


def test_a_pipe_has_no_way_back() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    way = ReturnPath()
    way.channel = Channel(reading)
    with pytest.raises(StreamUnsupported, match=r"this transport has none.*position 8"):
        way.open(8)
    assert not way.is_open
    way.channel.close()


def test_answers_of_several_threads_stay_whole() -> None:
    ours, theirs = socket.socketpair()
    way = ReturnPath()
    way.channel = Channel(ours.detach())
    way.open(0)
    start = threading.Barrier(THREADS)

    def answer(thread: int) -> None:
        start.wait(10)
        for number in range(ANSWERS):
            way.answer(Pong(thread * ANSWERS + number))

    decoder = ReturnPathDecoder()
    found: list[object] = []
    with theirs, ThreadPoolExecutor(THREADS) as threads:
        sent = [threads.submit(answer, thread) for thread in range(THREADS)]
        theirs.settimeout(10)
        while len(found) < THREADS * ANSWERS:
            found += decoder.feed(theirs.recv(1 << 16))
        for future in sent:
            future.result()
    assert sorted(message.value for message in found if isinstance(message, Pong)) == list(
        range(THREADS * ANSWERS)
    )
    way.channel.close()


async def test_the_last_word_goes_to_a_source_that_listens_only() -> None:
    ours, theirs = socket.socketpair()
    way = ReturnPath()
    with theirs:
        await way.answer_last(Shut(1))  # nobody has come yet
        way.channel = Channel(ours.detach())
        await way.answer_last(Shut(1))
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        way.open(0)
        await way.answer_last(Shut(1))
        assert ReturnPathDecoder().feed(theirs.recv(100)) == [Shut(1)]
    await way.answer_last(Shut(1))  # who is gone is told nothing, and that is no error
    way.channel.close()

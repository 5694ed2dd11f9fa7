"""A tracker that several ask."""

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.dirty_log import DirtyLog
from migrationd.guest.memory import AnonymousMemory, Pages
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec

PAGE = 4096


class Memory:
    """What is written; implements ``DirtyTracker`` for one reader."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.is_started = False

    def start(self) -> None:
        """See the protocol."""
        self.is_started = True
        self.written.clear()

    def collect(self) -> list[Pages]:
        """See the protocol."""
        assert self.is_started
        found = np.array(sorted(self.written), np.int64)
        self.written.clear()
        return [found]

    def peek(self) -> int:
        """See the protocol."""
        return len(self.written) * PAGE

    def stop(self) -> None:
        """See the protocol."""
        self.is_started = False


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def log(memory: Memory) -> DirtyLog:
    guest = ParkedGuest.create(
        GuestIdentity(),
        [RamBlockSpec("ram", 64 * PAGE, PAGE)],
        lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size),
    )
    return DirtyLog(memory, guest.ram)


def test_what_one_collects_the_other_is_told_too(memory: Memory, log: DirtyLog) -> None:
    first, second = log.reader(), log.reader()
    first.start()
    memory.written |= {1, 2}
    second.start()
    memory.written |= {2, 3}
    assert first.collect()[0].tolist() == [1, 2, 3]
    assert second.peek() == 2 * PAGE
    memory.written |= {9}
    assert second.collect()[0].tolist() == [2, 3, 9]
    assert first.peek() == PAGE
    assert first.collect()[0].tolist() == [9]
    assert second.collect()[0].tolist() == []


def test_the_last_one_ends_it(memory: Memory, log: DirtyLog) -> None:
    first, second = log.reader(), log.reader()
    with pytest.raises(GuestError, match="not tracked"):
        first.collect()
    first.start()
    second.start()
    second.stop()
    assert memory.is_started
    memory.written |= {4}
    assert first.peek() == PAGE
    first.stop()
    first.stop()
    assert not memory.is_started
    with pytest.raises(GuestError, match="not tracked"):
        first.collect()
    first.start()
    assert first.collect()[0].tolist() == []


def test_starting_again_forgets_for_oneself_alone(memory: Memory, log: DirtyLog) -> None:
    first, second = log.reader(), log.reader()
    first.start()
    second.start()
    memory.written |= {5}
    second.start()
    assert second.collect()[0].tolist() == []
    assert first.collect()[0].tolist() == [5]

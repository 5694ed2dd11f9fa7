"""Every test of a transport leaves no descriptor, no thread and no child behind."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

LEAVE_S = 10.0


def open_fds() -> dict[str, str]:
    """Descriptors and what they are, without what an event loop keeps for itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> set[str]:
    """Process ids of this process's children."""
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


@pytest.fixture(scope="session", autouse=True)
def _uvloop_first() -> None:
    """Have the descriptors there that uvloop opens once for the whole process."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def _leaves_nothing(_loop_first: None) -> Iterator[None]:
    before, threads, processes = open_fds(), set(threading.enumerate()), children()
    yield
    deadline = time.monotonic() + LEAVE_S
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not set(threading.enumerate()) - threads
    after = open_fds()
    assert {fd: after[fd] for fd in after.keys() - before.keys()} == {}
    assert children() <= processes


@pytest.fixture
async def _loop_first() -> None:
    """Have the loop's own descriptors there before the count."""
    asyncio.get_running_loop()

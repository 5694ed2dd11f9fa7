"""A workload's block, whose memory can be replaced."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrationd.errors import GuestError
from migrationd.workload.block import Block, Origin


@pytest.fixture
def block() -> Block:
    return Block("heap", 8192)


def test_memory_is_replaced_at_the_same_address(block: Block) -> None:
    address = block.address
    view = memoryview(block.memory)
    view[:4] = b"mine"
    other = Block("other", 8192)
    other.memory[:5] = b"other"
    block.remap(other.fd, Origin.LENT)
    assert block.address == address
    assert bytes(view[:5]) == b"other"
    view[:5] = b"there"
    assert other.memory[:5] == b"there"
    block.renew()
    assert bytes(view[:5]) == bytes(5)
    assert other.memory[:5] == b"there"
    assert block.origin is Origin.OWN


def test_what_is_too_short_or_no_memory_is_refused(block: Block) -> None:
    block.memory[:4] = b"mine"
    with pytest.raises(GuestError, match="8192 bytes: 4096 were handed"):
        block.remap(Block("short", 4096).fd, Origin.LENT)
    reading, writing = os.pipe()
    with pytest.raises(GuestError):
        block.remap(reading, Origin.LENT)
    os.close(reading)
    os.close(writing)
    assert block.memory[:4] == b"mine"
    assert block.origin is Origin.OWN


HOLDER = """
import sys
from migrationd.workload.block import Block, Origin
block = Block("heap", 8192)
block.remap(int(sys.argv[1]), Origin.LENT)
block.lock()
print("locked", flush=True)
sys.stdin.read(1)
block.unlock()
print("unlocked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(block: Block) -> Iterator["subprocess.Popen[str]"]:
    """Another process that runs on the block's memory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(block.fd)],
        pass_fds=[block.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_two_processes_do_not_run_on_the_same_memory(block: Block) -> None:
    with holder(block) as process:
        with pytest.raises(GuestError, match="another process runs on this memory"):
            block.lock()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(".")
        process.stdin.flush()
        assert process.stdout.readline() == "unlocked\n"
        block.lock()
        block.lock()
        block.unlock()


def test_a_process_that_dies_runs_no_more(block: Block) -> None:
    with holder(block) as process:
        process.kill()
        process.wait()
        block.lock()
        block.unlock()

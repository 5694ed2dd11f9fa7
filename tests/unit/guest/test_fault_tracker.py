"""Writes of a real process, tracked by the faults that they wait for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.errors import GuestError
from migrationd.guest.attached import AttachedGuest
from migrationd.linux.userfaultfd import can_serve_faults
from tests.unit.guest.support import Process, attached_program

pytestmark = pytest.mark.skipif(
    not can_serve_faults(), reason="needs Linux 5.19 and a userfaultfd for the kernel's faults too"
)

PROGRAM = """
import sys
from migrationd.workload import Workload
workload = Workload("unit")
heap = workload.add_block("heap", 4 << 20)
spare = workload.add_block("spare", 64 << 10)
workload.attach(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    for word in line.split():
        block, page = word.split(":")
        (heap if block == "heap" else spare)[int(page) * 4096 + 7] += 1
    print("done", flush=True)
"""


class Writer:
    """A guest that writes what it is told, when it is told."""

    def __init__(self, guest: AttachedGuest, process: Process) -> None:
        self.guest = guest
        self.process = process

    def write(self, block: str, *pages: int) -> None:
        """Let it write some pages, in this order, and wait until it has."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(f"{block}:{page}" for page in pages) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def collect(self) -> list[list[int]]:
        """What was found."""
        return [pages.tolist() for pages in self.guest.tracker.collect()]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with attached_program(tmp_path, PROGRAM, "userfaultfd") as (guest, process):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Writer(guest, process)


def test_each_write_is_found_once(writer: Writer) -> None:
    tracker = writer.guest.tracker
    tracker.start()
    assert writer.collect() == [[], []]
    writer.write("heap", 900, 5, 300, 5)
    writer.write("spare", 15)
    assert tracker.peek() == 4 * 4096
    assert writer.collect() == [[5, 300, 900], [15]]
    assert writer.collect() == [[], []]
    writer.write("heap", 5)
    assert writer.collect() == [[5], []]
    tracker.stop()
    writer.write("heap", 5)


def test_who_goes_through_its_memory_in_order_waits_seldom(writer: Writer) -> None:
    writer.guest.tracker.start()
    writer.write("heap", *range(100, 200))
    found = writer.collect()[0]
    assert set(range(100, 200)) <= set(found)
    assert found[0] == 100
    assert found[-1] < 200 + 32
    # What was taken for written is protected again as well.
    writer.write("heap", found[-1])
    assert writer.collect()[0] == [found[-1]]


def test_it_is_not_slowed_down_when_nobody_asks(writer: Writer) -> None:
    tracker = writer.guest.tracker
    tracker.start()
    with pytest.raises(GuestError, match="watched for something else"):
        writer.guest.memory_at_instant().arm()
    tracker.stop()
    memory = writer.guest.memory_at_instant()
    memory.arm()
    memory.close()
    tracker.start()
    writer.write("heap", 1)
    assert writer.collect() == [[1], []]


def test_a_guest_that_is_gone_is_an_error(writer: Writer) -> None:
    writer.guest.tracker.start()
    writer.write("heap", 1)
    writer.process.kill()
    writer.process.wait()
    with pytest.raises(GuestError, match="the workload is gone"):
        writer.guest.tracker.collect()


def test_a_waiting_write_goes_on_when_its_daemon_lets_go(writer: Writer) -> None:
    writer.guest.tracker.start()
    writer.write("heap", 1)
    writer.guest.close()
    writer.write("heap", *range(1000))
    assert writer.process.poll() is None

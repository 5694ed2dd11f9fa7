"""What it costs to know which pages a workload writes: the looks, and the writes.

    python -m benchmarks.dirty [--mib 1024] [--reps N] [--seconds S]

A look finds what was written and protects it again. The writer is a process that sets whole
pages, 1 MiB at a time, in order; it is looked at once a second, as by passes of a migration,
or ten times. Its processor time for each GB tells more than its rate on a machine that is
not quiet.
"""

import argparse
import ctypes
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from migrationd.guest.attached import AttachedGuest
from migrationd.guest.dirty import DirtyTracker, PagemapTracker
from migrationd.guest.fault_tracker import FaultTracker
from migrationd.guest.memory import MappedMemory, Pages, SharedMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.guest.workload_link import WorkloadLink
from migrationd.guest.write_faults import WriteFaults
from migrationd.linux.iovec import address_of
from migrationd.linux.userfaultfd import (
    ASYNC_TRACKING,
    MODE_WP,
    SYNC_TRACKING,
    open_userfaultfd,
    register,
)

PAGE = 4096
GOALS_MS = {"clean": 1.5, "10 % strided": 8.0}
SLOWDOWN_GOAL = 1.1

WRITER = """
import ctypes, sys, time
from migrationd.workload import Workload
path, mib = sys.argv[1], int(sys.argv[2])
workload = Workload("benchmark")
memory = workload.add_block("heap", mib << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(address, 1, mib << 20)
workload.attach(path)
print("ready", flush=True)
for line in sys.stdin:
    seconds, rate = map(float, line.split())
    cpu, begin, done, value = time.process_time(), time.perf_counter(), 0, 0
    while (now := time.perf_counter() - begin) < seconds:
        if rate and done > now * rate:
            time.sleep(0.0005)
            continue
        with workload.active():
            ctypes.memset(address + done % (mib << 20), value, 1 << 20)
        done += 1 << 20
        value = done // (mib << 20) % 256
    print(done / now, (time.process_time() - cpu) / done, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Area:
    """Memory of this process whose writes are tracked."""

    name: str
    block: RamBlock
    tracker: DirtyTracker


def pagemap_area(mib: int, name: str) -> Area:
    """Shared or anonymous memory, tracked as a workload's."""
    size = mib << 20
    memory: MappedMemory
    if name == "memfd":
        fd = os.memfd_create("benchmark", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        memory = SharedMemory(fd, size, PAGE)
    else:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = MappedMemory(area, size, PAGE)
    memory.view[::PAGE] = 1
    block = RamBlock(RamBlockSpec(name, size, PAGE), memory)
    address = address_of(memory.view)
    register(open_userfaultfd(ASYNC_TRACKING), address, size, MODE_WP)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    return Area(name, block, PagemapTracker(pagemap, [(block, address)]))


def fault_area(mib: int) -> Area:
    """Shared memory, tracked by the faults that writes wait for."""
    size = mib << 20
    fd = os.memfd_create("benchmark", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    memory = SharedMemory(fd, size, PAGE)
    memory.view[::PAGE] = 1
    address = address_of(memory.view)
    block = WorkloadBlock(RamBlockSpec("memfd", size, PAGE), memory, address)
    faults = open_userfaultfd(SYNC_TRACKING, only_user_faults=False)
    tracker = FaultTracker(WriteFaults(faults, -1, [(block, address)]), [block])
    return Area("memfd, by faults", block, tracker)


def write(area: Area, pages: Pages) -> None:
    """Write a byte of each page, without the lock that whoever serves the fault needs."""
    if isinstance(area.tracker, PagemapTracker):
        area.block.memory.view[pages * PAGE] += 1
        return
    address = address_of(area.block.memory.view)
    for page in pages.tolist():
        ctypes.memset(address + page * PAGE, 3, 1)


def report_looks(area: Area, reps: int) -> None:
    """Print what a look costs."""
    count = area.block.page_count
    shares = {
        "clean": np.empty(0, np.int64),
        "1 % strided": np.arange(0, count, 100),
        "10 % strided": np.arange(0, count, 10),
        "10 % in runs of 64": np.concatenate(
            [np.arange(first, min(first + 64, count)) for first in range(0, count, 640)]
        ),
    }
    if isinstance(area.tracker, PagemapTracker):
        shares["100 %"] = np.arange(count)
    area.tracker.start()
    area.tracker.collect()
    gib = area.block.used_length / 2**30
    for name, pages in shares.items():
        taken = []
        for _ in range(reps):
            write(area, pages)
            start = time.perf_counter()
            [found] = area.tracker.collect()
            taken.append((time.perf_counter() - start) * 1e3 / gib)
            if isinstance(area.tracker, PagemapTracker):
                assert np.array_equal(found, pages)
            else:
                assert not len(np.setdiff1d(pages, found))
        goal = GOALS_MS.get(name) if isinstance(area.tracker, PagemapTracker) else None
        text = "" if goal is None else f"  (goal {goal}) {'ok' if median(taken) <= goal else '--'}"
        print(f"  {area.name:18}{name:20}{median(taken):8.2f} ms per GiB, "
              f"best {min(taken):.2f}{text}")  # fmt: skip
    area.tracker.stop()


class Writer:
    """The process that writes, and the guest that it is here."""

    def __init__(self, mib: int, tracking: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="migrationd-")
        path = f"{self._directory.name}/guest"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-c", WRITER, path, str(mib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            link = WorkloadLink(listener.accept()[0])
        self.guest = AttachedGuest(link, link.introduction(), tracking)
        self.guest.begin(is_destination=False)
        self._line()

    def run(self, seconds: float, rate: float, every_s: float) -> tuple[float, float]:
        """Let it write.

        Args:
            seconds: For so long.
            rate: Bytes a second; 0: what it can.
            every_s: How often it is looked at; 0: not tracked at all.

        Returns:
            Bytes a second, and its processor seconds for each byte.
        """
        ended = threading.Event()
        looker = threading.Thread(target=self._look, args=(every_s, ended))
        if every_s:
            self.guest.tracker.start()
            looker.start()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds} {rate}\n")
        self._process.stdin.flush()
        achieved, cpu = map(float, self._line().split())
        ended.set()
        if every_s:
            looker.join()
            self.guest.tracker.stop()
        return achieved, cpu

    def close(self) -> None:
        """End it."""
        self.guest.close()
        self._process.kill()
        self._process.communicate()
        self._directory.cleanup()

    def _look(self, every_s: float, ended: threading.Event) -> None:
        while not ended.wait(every_s):
            self.guest.tracker.collect()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def report_slowdown(mib: int, seconds: float, reps: int) -> None:
    """Print what tracked writes cost, interleaved with those that are not tracked."""
    for tracking, rates in (("pagemap", (0.0, 204e6, 819e6)), ("userfaultfd", (204e6, 819e6))):
        writer = Writer(mib, tracking)
        try:
            for rate in rates:
                for every_s in (1.0, 0.1):
                    _report_pair(writer, tracking, seconds, rate, every_s, reps)
        finally:
            writer.close()


def _report_pair(
    writer: Writer, tracking: str, seconds: float, rate: float, every_s: float, reps: int
) -> None:
    plain, tracked = [], []
    for _ in range(reps):
        plain.append(writer.run(seconds, rate, 0.0))
        tracked.append(writer.run(seconds, rate, every_s))
    slower = median(a[0] / b[0] for a, b in zip(plain, tracked, strict=True))
    cpu = median(b[1] / a[1] for a, b in zip(plain, tracked, strict=True))
    wanted = f"{rate / 1e6:.0f} MB/s" if rate else "all it can"
    text = f"  {tracking:12}{wanted:12}a look each {every_s:3.1f} s: "
    before, after = (median(item[0] for item in taken) / 1e6 for taken in (plain, tracked))
    text += f"{before:6.0f} -> {after:6.0f} MB/s, x {slower:.2f} slower, CPU x {cpu:.2f}"
    if tracking == "pagemap":
        text += f"  (goal x {SLOWDOWN_GOAL}) {'ok' if slower <= SLOWDOWN_GOAL else '--'}"
    print(text)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    print(f"looks at {options.mib} MiB, medians of {options.reps}")
    for kind in ("memfd", "anonymous"):
        report_looks(pagemap_area(options.mib, kind), options.reps)
    report_looks(fault_area(options.mib), 1)
    print(f"a writer of {options.mib} MiB, untracked -> tracked, medians of {options.reps}")
    report_slowdown(options.mib, options.seconds, options.reps)


if __name__ == "__main__":
    main()

"""One migration between two peers, timed, with the CPU seconds of both; and smaller gauges."""

import asyncio
import json
import mmap
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.linux.meminfo import available_bytes

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_RUN_BYTES = 1 << 20
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sample:
    """What one migration took.

    Attributes:
        wall_s: From ``migrate`` to the later of the two ends' completed events.
        source_cpu_s: User and system time of the source meanwhile.
        destination_cpu_s: And of the destination.
        other_cpus: CPUs that everything else on the machine used meanwhile.
        wire_bytes: Bytes that the source sent.
    """

    wall_s: float
    source_cpu_s: float
    destination_cpu_s: float
    other_cpus: float
    wire_bytes: int


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def machine_cpu_s() -> float:
    """Time that all CPUs were busy so far."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, words[:7])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def peak_resident_bytes(pid: int) -> int:
    """The most memory that a process ever had resident."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def warm_memory(size_bytes: int) -> None:
    """Touch memory and give it back: its first touch ever can cost more than a migration.

    Not more than the machine has to give.
    """
    size_bytes = min(size_bytes, max(_RUN_BYTES, available_bytes() - _SPARE_BYTES))
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(area, np.uint8)[:: mmap.PAGESIZE]
        pages[:] = 1
        del pages


def warm_shared_memory(size_bytes: int) -> None:
    """:func:`warm_memory` for a workload that is to arrive: its memory comes in single pages.

    Those are others than huge ones are made of. To be called right before: a machine may give
    its host back what nobody has used for two seconds.
    """
    fd = os.memfd_create("warm")
    try:
        for _ in range(size_bytes // _RUN_BYTES):
            os.write(fd, bytes(_RUN_BYTES))
    finally:
        os.close(fd)


def fill_guest(pid: int, memory_bytes: int, start: int, content: str) -> None:
    """Write into a stopped QEMU's guest RAM.

    Args:
        pid: The QEMU; its RAM is the smallest mapping that can hold the guest's.
        memory_bytes: Size of the guest's RAM.
        start: Leave what is below this address alone.
        content: ``random``; ``half zero``, random in every other MiB; ``zero``; or
            ``compressible``, bytes of four random bits.
    """
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) rw", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE
    )
    sizes = sorted((int(end, 16) - int(begin, 16), int(begin, 16)) for begin, end in mappings)
    base = next(begin for size, begin in sizes if size >= memory_bytes)
    words = np.random.default_rng(1)
    if content == "zero":
        return
    step = 2 * _RUN_BYTES if content == "half zero" else _RUN_BYTES
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for at in range(start, memory_bytes, step):
            memory.seek(base + at)
            if content == "compressible":
                memory.write(words.integers(0, 16, _RUN_BYTES, np.uint8).tobytes())
            else:
                memory.write(words.bytes(_RUN_BYTES))


async def migrate(source: PeerProcess, destination: PeerProcess, uri: str) -> Sample:
    """Migrate and wait until both ends say completed.

    Raises:
        PeerError: One of them says something else.
    """
    for peer in (source, destination):
        await peer.set_capabilities({"events": True})
    await source.set_parameters({"max-bandwidth": 0})
    since = {id(peer): len(peer.events) for peer in (source, destination)}
    before = [cpu_s(source.pid), cpu_s(destination.pid), cpu_s(os.getpid()), machine_cpu_s()]
    start = time.perf_counter()
    await source.execute("migrate", {"uri": uri})
    for peer in (source, destination):
        await peer.wait_event(
            "MIGRATION",
            matching=lambda data: data.get("status") in ("completed", "failed"),
            since=since[id(peer)],
            timeout_s=60,
        )
        await peer.wait_migration("completed")
    wall_s = time.perf_counter() - start
    after = [cpu_s(source.pid), cpu_s(destination.pid), cpu_s(os.getpid()), machine_cpu_s()]
    ours_a, ours_b, ours_c, machine = (b - a for a, b in zip(before, after, strict=True))
    others = max(0.0, machine - ours_a - ours_b - ours_c)
    ram = (await source.query_migrate())["ram"]
    assert isinstance(ram, dict)
    return Sample(wall_s, ours_a, ours_b, others / wall_s, ram["transferred"])


@dataclass(frozen=True, slots=True)
class Taken:
    """What a migration took at one end.

    Attributes:
        wall_s: From the command to the event that ends it.
        cpu_s: User and system time of the peer meanwhile.
        other_cpus: CPUs that everything else on the machine used meanwhile.
    """

    wall_s: float
    cpu_s: float
    other_cpus: float


async def timed(peer: PeerProcess, command: str, arguments: dict[str, object]) -> Taken:
    """Run a migration command and wait for its end.

    Raises:
        PeerError: It does not end completed.
    """
    since = len(peer.events)
    ours = cpu_s(os.getpid())
    cpu, machine, start = cpu_s(peer.pid), machine_cpu_s(), time.perf_counter()
    await peer.execute(command, arguments)
    await peer.wait_event(
        "MIGRATION",
        matching=lambda data: data.get("status") in ("completed", "failed"),
        since=since,
        timeout_s=120,
    )
    wall_s = time.perf_counter() - start
    used, other = cpu_s(peer.pid) - cpu, machine_cpu_s() - machine
    await peer.wait_migration("completed")
    return Taken(wall_s, used, max(0.0, other - used - cpu_s(os.getpid()) + ours) / wall_s)


class StatusProbe:
    """A monitor client of its own that asks ``query-status`` over and over.

    Args:
        path: A monitor's socket.
    """

    def __init__(self, path: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROBE, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        self._child.stdout.readline()

    async def stop(self) -> list[float]:
        """Latencies in seconds."""
        out, _ = await asyncio.to_thread(self._child.communicate, "\n")
        return list(json.loads(out))


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def start_to_greeting_s() -> float:
    """Seconds from starting the daemon to its greeting."""
    with tempfile.TemporaryDirectory(prefix="migrationd-") as directory:
        path = f"{directory}/qmp.sock"
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "migrationd", "-qmp", f"unix:{path},server=on,wait=off"]
        ) as child:
            while True:
                try:
                    with socket.socket(socket.AF_UNIX) as client:
                        client.connect(path)
                        client.recv(4096)
                        break
                except OSError:
                    time.sleep(0.001)
            taken = time.perf_counter() - start
            child.terminate()
    return taken


async def idle_resident_bytes() -> int:
    """Resident memory of a daemon that has just started and answered."""
    async with await DaemonProcess.start(incoming="defer") as daemon:
        await daemon.execute("query-status")
        return daemon.resident_bytes


def median(values: Iterable[float]) -> float:
    """The middle value."""
    return statistics.median(values)


_PROBE = """
import json, select, socket, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
stream = sock.makefile("rwb")
stream.readline()
stream.write(b'{"execute": "qmp_capabilities"}'); stream.flush()
stream.readline()
print("ready", flush=True)
taken = []
while not select.select([sys.stdin], [], [], 0.002)[0]:
    start = time.perf_counter()
    stream.write(b'{"execute": "query-status"}'); stream.flush()
    while b'"return"' not in stream.readline():
        pass
    taken.append(time.perf_counter() - start)
print(json.dumps(taken))
"""

"""One migration between two peers, timed, with the CPU seconds of both."""

import asyncio
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one migration took."""

    wall_s: float
    source_cpu_s: float
    destination_cpu_s: float


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def warm_memory(size_bytes: int) -> None:
    """Touch memory and give it back: its first touch ever can cost more than a migration."""
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size_bytes, mmap.PAGESIZE):
            area[at] = 1


async def migrate(source: PeerProcess, destination: PeerProcess, uri: str) -> Sample:
    """Migrate and wait until both ends say completed."""
    for peer in (source, destination):
        await peer.set_capabilities({"events": True})
    await source.set_parameters({"max-bandwidth": 0})
    since_source, since_destination = len(source.events), len(destination.events)
    source_cpu, destination_cpu = cpu_s(source.pid), cpu_s(destination.pid)
    start = time.perf_counter()
    await source.execute("migrate", {"uri": uri})
    for peer, since in ((source, since_source), (destination, since_destination)):
        await peer.wait_event(
            "MIGRATION",
            matching=lambda data: data.get("status") == "completed",
            since=since,
            timeout_s=60,
        )
    wall_s = time.perf_counter() - start
    return Sample(wall_s, cpu_s(source.pid) - source_cpu, cpu_s(destination.pid) - destination_cpu)


class StatusProbe:
    """A monitor client of its own that asks ``query-status`` over and over."""

    def __init__(self, path: str) -> None:
        self._code = _PROBE
        self._path = path
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin to ask, in a process of its own."""
        self._child = subprocess.Popen(
            [sys.executable, "-c", self._code, self._path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        self._child.stdout.readline()

    async def stop(self) -> list[float]:
        """Latencies in seconds."""
        assert self._child is not None
        out, _ = await asyncio.to_thread(self._child.communicate, "\n")
        return list(json.loads(out))


def percentile(values: list[float], share: float) -> float:
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


def median(values: list[float]) -> float:
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

"""Background snapshots beside QEMU's: rate, processor time, how long the guest stands still.

    python -m benchmarks.snapshot [--mib 1024] [--rates 0,204,819] [--reps N] [--qemu VERSION]

All memory holds random bytes. The workload writes words into pages in random order, at a rate,
and looks at the clock after each 16 of them: the longest gap is what it noticed, of its being
stopped and of writes that waited; beside it the longest gap while as many bytes went through a
pipe without a snapshot, which is the machine's. QEMU's guest is its own: there only its own
``downtime`` is known.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import cpu_s, fill_guest, machine_cpu_s, median, warm_memory
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError, PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

RATE_GOAL_GB_S = 1.0
STALL_GOAL_MS = 10.0
GUEST = BootGuest(counted_pages=256, pages_per_s=1000)

WORKLOAD = """
import sys, threading, time
import numpy as np
from migrationd.workload import Workload
path, mib, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) * 1e6 / 4096
workload = Workload("benchmark")
memory = np.frombuffer(workload.add_block("heap", mib << 20), np.uint8)
source = np.random.default_rng(1)
for begin in range(0, len(memory), 1 << 24):
    memory[begin : begin + (1 << 24)] = np.frombuffer(source.bytes(1 << 24), np.uint8)
words = memory.view(np.uint64).reshape(-1, 512)
order = source.permutation(len(words))
longest = [0]

def serve():
    for line in sys.stdin:
        if line.strip() == "begin":
            longest[0] = 0
        else:
            print(longest[0], flush=True)

threading.Thread(target=serve, daemon=True).start()
workload.attach(path)
print("ready", flush=True)
at, last = 0, time.monotonic_ns()
step = last
owed = 0.0

def look(step):
    after = time.monotonic_ns()
    longest[0] = max(longest[0], after - step)
    return after

while True:
    with workload.active():
        now = time.monotonic_ns()
        owed = min(owed + (now - last) * rate / 1e9, 1000.0)
        count = int(owed)
        owed -= count
        for start in range(at, at + count, 16):
            words[order[np.arange(start, min(start + 16, at + count)) % len(order)], 0] += 1
            step = look(step)
        at = (at + count) % len(order)
    step = look(step)
    last = now
    time.sleep(0.0002)
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """Where a snapshot goes.

    Attributes:
        name: In words.
        uri: With ``{path}``.
        mapped_ram: The capability.
    """

    name: str
    uri: str
    mapped_ram: bool = False


KINDS = (
    Kind("exec:cat >/dev/null", "exec:cat >/dev/null"),
    Kind("file:", "file:{path}"),
    Kind("file:, mapped-ram", "file:{path}", mapped_ram=True),
)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one snapshot took.

    Attributes:
        wall_s: From ``migrate`` to ``completed``.
        cpu_s: Of the process that writes it, meanwhile.
        downtime_ms: As ``query-migrate`` says.
        gap_ms: Longest that the workload noticed; 0 where nobody looked.
        other_cpus: CPUs that everything but it used meanwhile.
    """

    wall_s: float
    cpu_s: float
    downtime_ms: int
    gap_ms: float
    other_cpus: float


class Watcher:
    """The workload, which looks at its own gaps."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def begin(self) -> None:
        """Look from now on."""
        self._say("begin")

    def longest_ms(self) -> float:
        """The longest gap since."""
        self._say("end")
        assert self._process.stdout is not None
        return int(self._process.stdout.readline()) / 1e6

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()


@contextlib.asynccontextmanager
async def workload(mib: int, rate: float) -> AsyncIterator[tuple[PeerProcess, Watcher]]:
    """A workload and its daemon."""
    with tempfile.TemporaryDirectory(prefix="migrationd-") as directory:
        path = f"{directory}/guest"
        arguments = ["-guest", f"attach:{path}", "-log-level", "warning"]
        command = [sys.executable, "-c", WORKLOAD, path, str(mib), str(rate)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                async with await DaemonProcess.start(arguments=arguments) as daemon:
                    assert process.stdout is not None
                    await asyncio.to_thread(process.stdout.readline)
                    await daemon.wait_run_state("running")
                    yield daemon, Watcher(process)
            finally:
                process.kill()


@contextlib.asynccontextmanager
async def qemu(binary: str, mib: int) -> AsyncIterator[PeerProcess]:
    """A QEMU whose guest writes next to nothing."""
    async with await QemuProcess.start(
        binary,
        machine="pc,memory-backend=ram0",
        memory_mib=mib,
        guest=GUEST,
        arguments=["-object", f"memory-backend-ram,id=ram0,size={mib}M,prealloc=on"],
        timeout_s=60,
    ) as source:
        await source.wait_serial(2)
        await source.execute("stop")
        fill_guest(source.pid, mib << 20, GUEST.needed_bytes, "random")
        await source.execute("cont")
        yield source


async def take(peer: PeerProcess, kind: Kind, directory: Path, watcher: Watcher | None) -> Taken:
    """One snapshot; its file is gone afterwards."""
    path = directory / "migrationd-benchmark.snapshot"
    await peer.set_capabilities(
        {"events": True, "background-snapshot": True, "mapped-ram": kind.mapped_ram}
    )
    await peer.set_parameters({"max-bandwidth": 0})
    since = len(peer.events)
    if watcher is not None:
        watcher.begin()
    cpu, machine, start = cpu_s(peer.pid), machine_cpu_s(), time.perf_counter()
    try:
        await peer.execute("migrate", {"uri": kind.uri.format(path=path)})
        await peer.wait_event(
            "MIGRATION",
            matching=lambda data: data.get("status") in ("completed", "failed"),
            since=since,
            timeout_s=120,
        )
        wall_s = time.perf_counter() - start
        used, other = cpu_s(peer.pid) - cpu, machine_cpu_s() - machine
        gap_ms = watcher.longest_ms() if watcher is not None else 0.0
        await peer.wait_migration("completed")
        downtime = (await peer.query_migrate())["downtime"]
        assert isinstance(downtime, int)
        return Taken(wall_s, used, downtime, gap_ms, (other - used) / wall_s)
    finally:
        path.unlink(missing_ok=True)


async def without(mib: int, watcher: Watcher) -> float:
    """Longest gap in ms while as much goes through a pipe as a snapshot sends."""
    command = f"head -c {mib << 20} /dev/zero | cat >/dev/null"
    watcher.begin()
    process = await asyncio.create_subprocess_shell(command)
    await process.wait()
    return watcher.longest_ms()


def show(who: str, kind: Kind, mib: int, taken: list[Taken], machine_ms: float | None) -> None:
    """Print the medians of one kind, and the worst gap."""
    wall, cpu, downtime, other = (
        median(getattr(item, name) for item in taken)
        for name in ("wall_s", "cpu_s", "downtime_ms", "other_cpus")
    )
    rate = (mib << 20) / wall / 1e9
    text = f"{who:26}{kind.name:22}{rate:6.2f} GB/s{cpu:7.2f} CPU s{downtime:6.0f} ms"
    if machine_ms is not None:
        gap = max(item.gap_ms for item in taken)
        text += f"{gap:10.1f} ms, without {machine_ms:.1f} ms"
    print(f"{text}   others {other:.1f} CPUs")


async def run(mib: int, rates: list[float], reps: int, binary: str | None, directory: Path) -> None:
    """Measure and print."""
    # fmt: off
    print(f"background snapshots of {mib} MiB, all of it random bytes, {reps} each; medians, and "
          f"the longest gap of all (goals, idle: {RATE_GOAL_GB_S} GB/s, {STALL_GOAL_MS} ms)")
    print(f"{'':26}{'to':22}{'rate':>11}{'':12}{'stopped':>10}{'longest gap':>13}")
    # fmt: on
    for rate in rates:
        async with workload(mib, rate) as (daemon, watcher):
            for kind in KINDS:
                taken = []
                machine_ms = 0.0
                for _ in range(reps):
                    warm_memory((mib + 256) << 20)
                    taken.append(await take(daemon, kind, directory, watcher))
                    machine_ms = max(machine_ms, await without(mib, watcher))
                show(f"workload, {rate:.0f} MB/s", kind, mib, taken, machine_ms)
    if binary is None:
        return
    async with qemu(binary, mib) as source:
        for kind in KINDS:
            try:
                taken = []
                for _ in range(reps):
                    warm_memory((mib + 256) << 20)
                    taken.append(await take(source, kind, directory, None))
            except PeerError as error:
                print(f"QEMU {qemu_version(binary):21}{kind.name:22}{error}")
            else:
                show(f"QEMU {qemu_version(binary)}, idle", kind, mib, taken, None)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rates", default="0,204,819", help="MB of pages written a second")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--qemu", default=find_qemu("11.1") or find_qemu("10.0"))
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    rates = [float(item) for item in options.rates.split(",")]
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    asyncio.run(run(options.mib, rates, options.reps, options.qemu, options.directory))


if __name__ == "__main__":
    main()

"""A parked guest resumed by postcopy: time to RESUME, requests, total time, learned order.

    python -m benchmarks.postcopy [--reps N] [--gib 1,4,16] [--qemu BINARY]

Beside QEMU in the same run: its restore of the same guest from a mapped-ram file (9.0 and
later), and QEMU -> QEMU postcopy of the same guest. Prints medians; on a machine that
does other work only ratios of one run mean anything.
"""

import argparse
import asyncio
import contextlib
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

SPARSE = BootGuest(counted_pages=1024, pages_per_s=20000)
FULL = BootGuest(counted_pages=65536, filled_pages=131072)
"""768 MiB that hold something; it counts through 256 MiB of them as fast as it can."""

TO_RESUME_GOAL_MS = 30.0
COLD_GOAL_MS = 60.0
_REQUESTS = re.compile(r"p50 (\d+) us, p99 (\d+) us")


class Bench:
    """One guest: the way into daemons, files and other QEMUs.

    Args:
        binary: QEMU.
        guest: What runs.
        memory_mib: Guest RAM.
        directory: Scratch.
    """

    def __init__(self, binary: str, guest: BootGuest, memory_mib: int, directory: Path) -> None:
        self._binary = binary
        self._guest = guest
        self._memory_mib = memory_mib
        self._directory = directory
        self._sockets = 0

    def socket(self) -> Path:
        """A fresh path."""
        self._sockets += 1
        return self._directory / f"s{self._sockets}"

    async def qemu(self, incoming: str | None = None) -> QemuProcess:
        """A QEMU with the guest."""
        return await QemuProcess.start(
            self._binary, machine="pc", memory_mib=self._memory_mib, guest=self._guest,
            incoming=incoming, timeout_s=120,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def target(self, *, preempt: bool) -> AsyncIterator[tuple[QemuProcess, str]]:
        """A QEMU that waits for a postcopy."""
        uri = f"unix:{self.socket()}"
        async with await self.qemu("defer") as qemu:
            await qemu.set_capabilities(
                {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}
            )
            await qemu.execute("migrate-incoming", {"uri": uri})
            yield qemu, uri

    async def park(self, *arguments: str) -> DaemonProcess:
        """A daemon that holds the guest as a template, after one pass of it."""
        path = self.socket()
        async with await self.qemu() as source:
            await source.wait_serial(2, timeout_s=120)
            daemon = await DaemonProcess.start(
                incoming=f"unix:{path}", arguments=["-keep", *arguments]
            )
            await source.migrate(f"unix:{path}")
            await source.wait_migration("completed", timeout_s=300)
            await daemon.wait_run_state("paused", timeout_s=60)
        return daemon

    async def save(self, path: Path) -> None:
        """Let QEMU write the guest to a mapped-ram file."""
        async with await self.qemu() as source:
            await source.wait_serial(2, timeout_s=120)
            await source.set_capabilities({"mapped-ram": True})
            await source.migrate(f"file:{path}", return_path=False)
            await source.wait_migration("completed", timeout_s=300)


async def lazily(source: PeerProcess, uri: str, *, preempt: bool) -> float:
    """Begin a postcopy at once; returns the wall clock of the command, seconds."""
    await source.set_capabilities(
        {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}
    )
    await source.set_parameters({"max-bandwidth": 0})
    begin_s = time.time()
    await asyncio.gather(
        source.execute("migrate", {"uri": uri}), source.execute("migrate-start-postcopy")
    )
    return begin_s


async def resumed_s(qemu: QemuProcess) -> float:
    """Wall clock of the RESUME event, by QEMU's own stamp."""
    event = await qemu.wait_event("RESUME", timeout_s=120)
    stamp = event["timestamp"]
    assert isinstance(stamp, dict)
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


async def time_to_resume(binary: str, gib: int, reps: int, root: Path) -> None:
    """From ``migrate`` to RESUME, from memory, from a file, from a cold one; QEMU beside it."""
    times: dict[str, list[float]] = {}
    directory = root / f"g{gib}"
    directory.mkdir()
    bench = Bench(binary, SPARSE, gib << 10, directory)
    ram_dir = ("-ram-dir", str(directory), "-name", "g")
    async with await bench.park() as memory, await bench.park(*ram_dir) as file:
        saved: Path | None = directory / "saved"
        try:
            await bench.save(directory / "saved")
        except Exception as error:  # a QEMU without mapped-ram
            print(f"  QEMU writes no mapped-ram file: {error}")
            saved = None
        for _ in range(reps):
            for name, daemon in (("memory", memory), ("file", file), ("cold file", file)):
                if name == "cold file":
                    forget(directory / "g.mapped-ram")
                async with bench.target(preempt=False) as (qemu, uri):
                    begin_s = await lazily(daemon, uri, preempt=False)
                    times.setdefault(name, []).append((await resumed_s(qemu) - begin_s) * 1000)
                    await daemon.wait_migration("completed", timeout_s=120)
            if saved is not None:
                async with await bench.qemu("defer") as qemu:
                    await qemu.set_capabilities({"events": True, "mapped-ram": True})
                    begin_s = time.time()
                    await qemu.execute("migrate-incoming", {"uri": f"file:{saved}"})
                    times.setdefault("QEMU, its mapped-ram file", []).append(
                        (await resumed_s(qemu) - begin_s) * 1000
                    )
    for name, values in times.items():
        goal_ms = COLD_GOAL_MS if "cold" in name else TO_RESUME_GOAL_MS
        goal = "" if "QEMU" in name else f"  goal {goal_ms:.0f}"
        spread = f"({min(values):.1f} … {max(values):.1f})"
        print(f"  {gib:3} GiB  {name:26} {median(values):8.1f} ms  {spread}{goal}")


async def total_time(binary: str, reps: int, root: Path) -> None:
    """A full guest to its last page, beside QEMU -> QEMU, and its requests at our end."""
    bench = Bench(binary, FULL, 1024, root)
    walls: dict[str, list[float]] = {}
    latencies: dict[str, list[tuple[float, float]]] = {}
    async with await bench.park("-learn-order", "off") as daemon:
        for _ in range(reps):
            for preempt in (False, True):
                channels = "preempt" if preempt else "plain"
                async with bench.target(preempt=preempt) as (_, uri):
                    begin = time.monotonic()
                    await lazily(daemon, uri, preempt=preempt)
                    await daemon.wait_migration("completed", timeout_s=120)
                    walls.setdefault(f"migrationd {channels}", []).append(time.monotonic() - begin)
                    p50, p99 = _REQUESTS.findall(daemon.stderr)[-1]
                    latencies.setdefault(channels, []).append((float(p50), float(p99)))
                async with (
                    bench.target(preempt=preempt) as (_, uri),
                    await bench.qemu() as source,
                ):
                    await source.wait_serial(2, timeout_s=120)
                    begin = time.monotonic()
                    await lazily(source, uri, preempt=preempt)
                    await source.wait_migration("completed", timeout_s=120)
                    walls.setdefault(f"QEMU {channels}", []).append(time.monotonic() - begin)
    for channels in ("plain", "preempt"):
        ours, base = walls[f"migrationd {channels}"], walls[f"QEMU {channels}"]
        ratio = median(a / b for a, b in zip(ours, base, strict=True))
        print(f"  {channels:8} total {median(ours):.2f} s, QEMU {median(base):.2f} s, "
              f"ratio {ratio:.2f} (goal 1.0)")  # fmt: skip
        middle = median(p50 for p50, _ in latencies[channels])
        tail = median(p99 for _, p99 in latencies[channels])
        print(f"  {channels:8} request to last byte at our end: "
              f"p50 {middle:.0f} us, p99 {tail:.0f} us")  # fmt: skip


async def learned(binary: str, root: Path) -> None:
    """The same guest from a cold file, twice: requests and the time of its first pass."""
    directory = root / "learned"
    directory.mkdir()
    bench = Bench(binary, FULL, 1024, directory)
    async with await bench.park("-ram-dir", str(directory), "-name", "g") as daemon:
        for name in ("first", "second", "third"):
            forget(directory / "g.mapped-ram")
            async with bench.target(preempt=True) as (qemu, uri):
                begin = time.monotonic()
                await lazily(daemon, uri, preempt=True)
                await qemu.wait_serial(1, timeout_s=120)
                steady_s = time.monotonic() - begin
                info = await daemon.wait_migration("completed", timeout_s=120)
                ram = info["ram"]
                assert isinstance(ram, dict)
                print(f"  {name:6} resume, cold file: {ram['postcopy-requests']} requests, "
                      f"first pass after {steady_s:.2f} s")  # fmt: skip


async def run(binary: str, sizes: list[int], reps: int) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)}, postcopy out of migrationd, {reps} repetitions")
    with tempfile.TemporaryDirectory(prefix="migrationd-bench-") as name:
        print("migrate to RESUME:")
        for gib in sizes:
            await time_to_resume(binary, gib, reps, Path(name))
        print("768 MiB that hold something:")
        await total_time(binary, reps, Path(name))
        print("learned order:")
        await learned(binary, Path(name))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--gib", default="1,4,16", help="sizes of sparse guests")
    parser.add_argument("--qemu", default=None)
    options = parser.parse_args()
    binary = options.qemu or find_qemu()
    if binary is None:
        raise SystemExit(
            "qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)"
        )
    asyncio.run(run(binary, [int(text) for text in options.gib.split(",")], options.reps))


if __name__ == "__main__":
    main()

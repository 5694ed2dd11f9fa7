"""A parked guest resumed by postcopy: time to RESUME, requests, total time, learned order.

    python -m benchmarks.postcopy [--reps N] [--gib 1,4,16] [--qemu BINARY]
        [--only resume,total,total-2g,requests,learned]

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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.measure import cpu_s, warm_memory
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

SPARSE = BootGuest(counted_pages=1024, pages_per_s=20000)
FULL = BootGuest(counted_pages=65536, filled_pages=131072)
"""768 MiB that hold something; it counts through 256 MiB of them as fast as it can."""

FULL_2G = BootGuest(counted_pages=65536, filled_pages=456704)
"""2040 MiB that hold something."""

TO_RESUME_GOAL_MS = 30.0
COLD_GOAL_MS = 60.0
SCATTERED = BootGuest(counted_pages=8192, scattered_over_pages=262144)
"""It walks 32 MiB that are scattered over 1 GiB, half of which is random."""

_ANSWERED = re.compile(r"page requests, (\d+) answered")
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
    async def target(
        self, *, preempt: bool, blocktime: bool = False
    ) -> AsyncIterator[tuple[QemuProcess, str]]:
        """A QEMU that waits for a postcopy."""
        uri = f"unix:{self.socket()}"
        async with await self.qemu("defer") as qemu:
            await qemu.set_capabilities(
                {
                    "events": True,
                    "postcopy-ram": True,
                    "postcopy-preempt": preempt,
                    "postcopy-blocktime": blocktime,
                }
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


@dataclass
class Total:
    """What whole postcopies of one kind took, by repetition.

    Attributes:
        wall_s: From ``migrate`` to the source's completed.
        cpu_s: Processor time of source and destination; the guest's own is in the latter.
        requests: Page requests that reached the source.
        passes: Passes over its range that the guest made meanwhile.
        latency_us: p50 and p99 from the arrival of a request to its last byte; ours only.
    """

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[tuple[float, float]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    latency_us: list[tuple[float, float]] = field(default_factory=list)

    async def measure(
        self, source: PeerProcess, qemu: QemuProcess, uri: str, preempt: bool
    ) -> None:
        """Move the guest."""
        before = cpu_s(source.pid), cpu_s(qemu.pid)
        begin = time.monotonic()
        await lazily(source, uri, preempt=preempt)
        info = await source.wait_migration("completed", timeout_s=300)
        self.wall_s.append(time.monotonic() - begin)
        self.cpu_s.append((cpu_s(source.pid) - before[0], cpu_s(qemu.pid) - before[1]))
        self.passes.append(len(qemu.serial))
        ram = info["ram"]
        assert isinstance(ram, dict)
        self.requests.append(int(str(ram["postcopy-requests"])))
        if isinstance(source, DaemonProcess):
            found = _REQUESTS.findall(source.stderr)
            self.latency_us.append((float(found[-1][0]), float(found[-1][1])))

    def row(self, name: str) -> str:
        """Medians in one line."""
        source_s = median(source for source, _ in self.cpu_s)
        target_s = median(target for _, target in self.cpu_s)
        return (
            f"  {name:20} {median(self.wall_s):6.2f} s, CPU {source_s:5.2f} + {target_s:5.2f} s, "
            f"{median(self.requests):7.0f} requests, guest {median(self.passes):3.0f} passes"
        )


async def total_time(
    binary: str, reps: int, root: Path, guest: BootGuest = FULL, memory_mib: int = 1024
) -> None:
    """A full guest to its last page, beside QEMU -> QEMU, and its requests at our end."""
    bench = Bench(binary, guest, memory_mib, root)
    totals: dict[str, Total] = {}
    async with await bench.park("-learn-order", "off") as daemon:
        for _ in range(reps):
            for preempt in (False, True):
                channels = "preempt" if preempt else "plain"
                warm_memory(memory_mib << 20)
                async with bench.target(preempt=preempt) as (qemu, uri):
                    total = totals.setdefault(f"migrationd {channels}", Total())
                    await total.measure(daemon, qemu, uri, preempt)
                warm_memory(memory_mib << 21)
                async with (
                    bench.target(preempt=preempt) as (qemu, uri),
                    await bench.qemu() as source,
                ):
                    await source.wait_serial(2, timeout_s=120)
                    total = totals.setdefault(f"QEMU {channels}", Total())
                    await total.measure(source, qemu, uri, preempt)
    for channels in ("plain", "preempt"):
        ours, base = totals[f"migrationd {channels}"], totals[f"QEMU {channels}"]
        print(ours.row(f"migrationd {channels}"))
        print(base.row(f"QEMU {channels}"))
        ratio = median(a / b for a, b in zip(ours.wall_s, base.wall_s, strict=True))
        middle = median(p50 for p50, _ in ours.latency_us)
        tail = median(p99 for _, p99 in ours.latency_us)
        print(f"  {channels:20} total ratio {ratio:.2f} (goal 1.0)")
        print(f"  {channels:20} request to last byte at our end: "
              f"p50 {middle:.0f} us, p99 {tail:.0f} us")  # fmt: skip


def waited_us(info: dict[str, object], fraction: float) -> str:
    """What this fraction of the guest's accesses waited less than, by the destination's word."""
    counts = info.get("postcopy-latency-dist")
    if not isinstance(counts, list) or not sum(counts):
        return "?"
    seen = 0
    for power, count in enumerate(counts):
        seen += count
        if seen >= fraction * sum(counts):
            return f"{2 << power}"
    return "?"


async def requests(binary: str, reps: int, root: Path) -> None:
    """A guest that asks for 32 MiB scattered over 1 GiB, one page at a time, behind a full push.

    What the guest waits is told by destinations of 11.1 and later, by powers of two.
    """
    directory = root / "requests"
    directory.mkdir()
    bench = Bench(binary, SCATTERED, 1100, directory)
    async with await bench.park("-learn-order", "off") as daemon:
        for bytes_per_s, preempt in ((0, False), (0, True), (256 << 20, False), (256 << 20, True)):
            kind = f"{'preempt' if preempt else 'plain'}, "
            kind += f"{bytes_per_s >> 20} MiB/s" if bytes_per_s else "no limit"
            for _ in range(reps):
                warm_memory(1100 << 20)
                async with bench.target(preempt=preempt, blocktime=True) as (qemu, uri):
                    await daemon.set_parameters({"max-postcopy-bandwidth": bytes_per_s})
                    total = Total()
                    await total.measure(daemon, qemu, uri, preempt)
                    middle, tail = total.latency_us[-1]
                    print(await _request_row(f"migrationd {kind}", total, qemu)
                          + f"; at our end p50 {middle:.0f}, p99 {tail:.0f} us")  # fmt: skip
                warm_memory(2200 << 20)
                async with (
                    bench.target(preempt=preempt, blocktime=True) as (qemu, uri),
                    await bench.qemu() as source,
                ):
                    await source.wait_serial(2, timeout_s=120)
                    await source.set_parameters({"max-postcopy-bandwidth": bytes_per_s})
                    total = Total()
                    await total.measure(source, qemu, uri, preempt)
                    print(await _request_row(f"QEMU {kind}", total, qemu))


async def _request_row(name: str, total: Total, qemu: QemuProcess) -> str:
    """One postcopy whose guest asked for scattered pages."""
    info = await qemu.wait_migration("completed", timeout_s=60)
    mean = info.get("postcopy-latency")
    source_s, target_s = total.cpu_s[-1]
    return (
        f"  {name:30} {total.wall_s[-1]:5.2f} s, CPU {source_s:4.2f} + {target_s:4.2f} s, "
        f"{total.requests[-1]:5} requests, the guest waited "
        f"{int(mean) / 1000 if isinstance(mean, int) else 0:.0f} us "
        f"(p50 < {waited_us(info, 0.5)}, p99 < {waited_us(info, 0.99)})"
    )


async def learned(binary: str, root: Path, bandwidth_bytes_per_s: int) -> None:
    """A scattered working set out of a cold file, again and again, with and without memory.

    A request is *blocking* where the page was not on its way yet. Each resume has a daemon of
    its own: pages that another has mapped would stay in the cache.
    """
    limit = f"{bandwidth_bytes_per_s >> 20} MiB/s" if bandwidth_bytes_per_s else "no limit"
    for learns in ("on", "off"):
        directory = root / f"learned-{learns}-{bandwidth_bytes_per_s}"
        directory.mkdir()
        bench = Bench(binary, SCATTERED, 1100, directory)
        arguments = ("-ram-dir", str(directory), "-name", "g", "-keep", "-learn-order", learns)
        async with await bench.park(*arguments) as daemon:
            await daemon.quit()
        first: tuple[int, float] | None = None
        for name in ("first", "second", "third"):
            forget(directory / "g.mapped-ram")
            warm_memory(1100 << 20)
            async with (
                await DaemonProcess.start(arguments=arguments) as daemon,
                bench.target(preempt=True) as (qemu, uri),
            ):
                await daemon.set_parameters({"max-postcopy-bandwidth": bandwidth_bytes_per_s})
                begin_s = await lazily(daemon, uri, preempt=True)
                resume_ms = (await resumed_s(qemu) - begin_s) * 1000
                # The first letter ends the pass that it was parked in.
                await qemu.wait_serial(2, timeout_s=120)
                steady_s = time.time() - begin_s
                info = await daemon.wait_migration("completed", timeout_s=300)
                total_s = time.time() - begin_s
                ram = info["ram"]
                assert isinstance(ram, dict)
                answered = _ANSWERED.findall(daemon.stderr)
                blocking = int(answered[-1]) if answered else 0
                first = first or (blocking, steady_s)
                print(f"  {limit:9} learning {learns:3} {name:6}: RESUME {resume_ms:5.1f} ms, "
                      f"first pass after {steady_s:5.2f} s ({first[1] / steady_s:4.1f} x), "
                      f"total {total_s:5.2f} s, "
                      f"requests {ram['postcopy-requests']:6}, blocking {blocking:5} "
                      f"({100 * (1 - blocking / max(first[0], 1)):5.1f} % fewer)")  # fmt: skip
                await daemon.quit()


PIECES = ("resume", "total", "total-2g", "requests", "learned")


async def run(binary: str, sizes: list[int], reps: int, only: list[str]) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)}, postcopy out of migrationd, {reps} repetitions")
    with tempfile.TemporaryDirectory(prefix="migrationd-bench-") as name:
        if "resume" in only:
            print("migrate to RESUME:")
            for gib in sizes:
                await time_to_resume(binary, gib, reps, Path(name))
        if "total" in only:
            print("768 MiB that hold something:")
            await total_time(binary, reps, Path(name))
        if "total-2g" in only:
            print("2 GiB that hold something:")
            await total_time(binary, reps, Path(name), FULL_2G, 2112)
        if "requests" in only:
            print("scattered requests:")
            await requests(binary, reps, Path(name))
        if "learned" in only:
            print("learned order:")
            for bytes_per_s in (0, 128 << 20):
                await learned(binary, Path(name), bytes_per_s)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--gib", default="1,4,16", help="sizes of sparse guests")
    parser.add_argument("--qemu", default=None)
    parser.add_argument("--only", default=",".join(PIECES), help="pieces, separated by commas")
    options = parser.parse_args()
    binary = options.qemu or find_qemu()
    if binary is None:
        raise SystemExit(
            "qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)"
        )
    only = options.only.split(",")
    if unknown := set(only) - set(PIECES):
        raise SystemExit(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    asyncio.run(run(binary, [int(text) for text in options.gib.split(",")], options.reps, only))


if __name__ == "__main__":
    main()

"""What a missing page costs a workload in postcopy, and how many it can have a second.

    python -m benchmarks.workload_postcopy [--mib N] [--reps N] [--qemu BINARY]

A C program (``benchmarks/faults.c``) touches pages in random order and measures each touch
itself: a fault, its way to the source, the page's way back, and the wake-up. Beside it in the
same run QEMU -> QEMU, whose destination measures its own waits from the fault on, without the
wake-up (``postcopy-latency``, 10.1 and later).
"""

import argparse
import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.measure import cpu_s, machine_cpu_s, warm_shared_memory
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

SOURCE = Path(__file__).with_name("faults.c")
HEADER = Path(__file__).resolve().parents[1] / "examples" / "c"
FAULT_NS = 3000
"""A touch that took longer was a fault."""

GOAL_P50_US, GOAL_P99_US = 120.0, 1000.0
GOAL_FAULTS_PER_S = 20_000.0
_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to touch memory.

    Attributes:
        name: In the table.
        threads: That touch.
        pages: Each of them.
        pause_us: Between two touches.
        push_bytes_per_s: ``max-postcopy-bandwidth``; 0 is all there is.
        preempt: ``postcopy-preempt``.
        transport: ``unix`` or ``tcp``.
    """

    name: str
    threads: int
    pages: int
    pause_us: int
    push_bytes_per_s: int
    preempt: bool
    transport: str


CELLS = tuple(
    Cell("1 thread, pushed at 100 MB/s, preempt", 1, 2000, 100, 100_000_000, True, transport)
    for transport in ("unix", "tcp")
) + tuple(
    Cell(f"1 thread, pushed at full rate{', preempt' if preempt else ''}",
         1, 1000, 100, 0, preempt, transport)
    for transport in ("unix", "tcp")
    for preempt in (True, False)
) + tuple(
    Cell("8 threads, hardly pushed, preempt", 8, 2000, 0, 1 << 20, True, transport)
    for transport in ("unix", "tcp")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run took.

    Attributes:
        waits_us: Of each fault, ascending.
        faults_per_s: Of all threads.
        cpu_s: Of source, destination and workload.
        other_cpus: CPUs that everything else on the machine used.
    """

    waits_us: npt.NDArray[np.float64]
    faults_per_s: float
    cpu_s: tuple[float, float, float]
    other_cpus: float

    def at(self, share: float) -> float:
        """A quantile in microseconds."""
        if not len(self.waits_us):
            return 0.0
        return float(self.waits_us[min(len(self.waits_us) - 1, int(len(self.waits_us) * share))])


async def wait_file(path: Path) -> str:
    """What a program reports when it is done."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _WAIT_S
    while not path.exists() or not path.read_text().endswith("\n"):
        if loop.time() > deadline:
            raise TimeoutError(f"{path.name}: nothing was reported")
        await asyncio.sleep(0.01)
    return path.read_text()


async def measure(cell: Cell, binary: Path, mib: int, directory: Path) -> Sample:
    """Move the program once."""
    async with contextlib.AsyncExitStack() as stack:
        ends: list[DaemonProcess] = []
        programs: list[asyncio.subprocess.Process] = []
        reports: list[Path] = []
        for name, incoming in (("here", None), ("there", "defer")):
            socket = directory / f"{name}.sock"
            reports.append(directory / f"{name}.txt")
            daemon = await DaemonProcess.start(
                incoming=incoming, arguments=["-guest", f"attach:{socket}"]
            )
            ends.append(await stack.enter_async_context(daemon))
            await daemon.set_capabilities({"postcopy-ram": True, "postcopy-preempt": cell.preempt})
            words = (socket, mib, cell.threads, cell.pages, cell.pause_us, reports[-1])
            process = await asyncio.create_subprocess_exec(binary, *map(str, words))
            programs.append(process)
            stack.push_async_callback(end, process, (*reports, socket))
            if incoming is None:
                await wait_file(reports[0])
        source, destination = ends
        uri = f"unix:{directory}/in.sock" if cell.transport == "unix" else "tcp:127.0.0.1:0"
        await destination.execute("migrate-incoming", {"uri": uri})
        if cell.transport == "tcp":
            uri = await destination.listening_uri()
        await source.set_parameters(
            {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": cell.push_bytes_per_s}
        )
        warm_shared_memory((mib + 128) << 20)
        await source.execute("migrate", {"uri": uri})
        await source.wait_migration("active")
        pids = (source.pid, destination.pid, programs[1].pid)
        before, all_before = [cpu_s(pid) for pid in pids], machine_cpu_s()
        started_s = asyncio.get_running_loop().time()
        await source.execute("migrate-start-postcopy")
        text = await wait_file(reports[1])
        elapsed_s = asyncio.get_running_loop().time() - started_s
        used = tuple(cpu_s(pid) - b for pid, b in zip(pids, before, strict=True))
        other = (machine_cpu_s() - all_before - sum(used)) / elapsed_s
        total_ns, *touches = map(int, text.split())
        waits = np.sort(np.array(touches, np.float64))
        waits = waits[waits > FAULT_NS] / 1000
        await source.set_parameters({"max-postcopy-bandwidth": 0})
        await source.wait_migration("completed", timeout_s=_WAIT_S)
        return Sample(waits, len(waits) / total_ns * 1e9, (used[0], used[1], used[2]), other)


async def end(process: asyncio.subprocess.Process, left: tuple[Path, ...]) -> None:
    """End a program and remove what it leaves."""
    if process.returncode is None:
        process.kill()
    await process.wait()
    for path in left:
        path.unlink(missing_ok=True)


async def qemu_latency_us(binary: str, directory: Path, *, preempt: bool) -> float | None:
    """Mean wait that a QEMU's destination measures; None if it does not measure."""
    guest = BootGuest(counted_pages=32768, filled_pages=32768)
    uri = f"unix:{directory}/q.sock"

    async def start(incoming: str | None) -> QemuProcess:
        return await QemuProcess.start(
            binary, machine="pc", memory_mib=512, guest=guest, incoming=incoming, timeout_s=120
        )

    on = {"postcopy-ram": True, "postcopy-preempt": preempt, "postcopy-blocktime": True}
    async with await start(None) as source, await start("defer") as destination:
        await source.wait_serial(1, timeout_s=120)
        for qemu in (source, destination):
            await qemu.set_capabilities(on)
        await destination.execute("migrate-incoming", {"uri": uri})
        await source.set_parameters({"max-bandwidth": 1 << 20})
        await source.execute("migrate", {"uri": uri})
        await source.wait_migration("active")
        await source.execute("migrate-start-postcopy")
        await source.wait_migration("completed", timeout_s=_WAIT_S)
        await destination.wait_migration("completed")
        found = (await destination.query_migrate()).get("postcopy-latency")
        return found / 1000 if isinstance(found, int) else None


def print_row(cell: Cell, samples: list[Sample]) -> None:
    """Medians of the repetitions."""
    p50, p99 = (median(sample.at(share) for sample in samples) for share in (0.5, 0.99))
    rate = median(sample.faults_per_s for sample in samples)
    used = [median(sample.cpu_s[n] for sample in samples) for n in range(3)]
    count = median(len(sample.waits_us) for sample in samples)
    print(
        f"{cell.transport:5}{cell.name:40}{count:7.0f}{p50:9.0f}{p99:9.0f}"
        f"{max(sample.at(1.0) for sample in samples):9.0f}{rate:10.0f}"
        f"  {used[0]:.2f} {used[1]:.2f} {used[2]:.2f}"
        f"{median(sample.other_cpus for sample in samples):6.2f}"
    )


async def run(qemu: str | None, mib: int, reps: int, only: str) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        binary = directory / "faults"
        command = ["cc", "-O2", "-Wall", "-I", HEADER, "-o", binary, SOURCE, "-lpthread"]
        subprocess.run(command, check=True)
        print(f"{mib} MiB of random bytes, medians of {reps}; microseconds as the workload sees "
              f"them, goals p50 {GOAL_P50_US:.0f}, p99 {GOAL_P99_US:.0f}, "
              f"{GOAL_FAULTS_PER_S:.0f} faults/s from 8 threads")  # fmt: skip
        print(f"{'':5}{'':40}{'faults':>7}{'p50':>9}{'p99':>9}{'longest':>9}{'faults/s':>10}"
              "  CPU s: source, destination, workload; CPUs of others")  # fmt: skip
        for cell in CELLS:
            if only in cell.name or only == cell.transport:
                print_row(cell, [await measure(cell, binary, mib, directory) for _ in range(reps)])
        if qemu is None:
            return
        for preempt in (True, False):
            means = [await qemu_latency_us(qemu, directory, preempt=preempt) for _ in range(reps)]
            known = [mean for mean in means if mean is not None]
            text = f"mean {median(known):.0f} us" if known else "does not measure it"
            print(f"QEMU {qemu_version(qemu)} -> QEMU{', preempt' if preempt else ''}: {text}")


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="postcopy as a workload sees it")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--qemu", default=find_qemu("11.1") or find_qemu("10.0"))
    parser.add_argument("--no-qemu", action="store_true", help="migrationd alone")
    parser.add_argument("--only", default="", help="cells whose name has this, or a transport")
    options = parser.parse_args()
    if shutil.which("cc") is None:
        print("no C compiler: apt-get install gcc", file=sys.stderr)
        return 1
    qemu = None if options.no_qemu else options.qemu
    asyncio.run(run(qemu, options.mib, options.reps, options.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())

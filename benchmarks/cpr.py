"""cpr-transfer on one host: how long a guest stands still, whatever its size.

    python -m benchmarks.cpr [--reps N] [--mib 256,1024,4096] [--qemu VERSION,...]

Between two workloads, each with its daemon, and beside it in the same run between two real
QEMUs. All memory holds something. STOP to RESUME are the timestamps of the two events; the
gap is what the workload itself notices: from its last step here to its first step there.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version
from tests.support.cpr import channel, incoming_arguments

STANDSTILL_GOAL_MS = 5.0
WAIT_S = 60.0
GUEST = BootGuest(counted_pages=256, pages_per_s=1000)

WORKLOAD = """
import sys, time
from types import SimpleNamespace
import numpy as np
from migrationd.workload import VMState, Workload, u64
socket, mib, report, is_source = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "source"
workload = Workload("benchmark")
heap = workload.add_block("heap", mib << 20)
state = SimpleNamespace(steps=0)
workload.add_device(VMState("steps", fields=(u64("steps"),)), state)
if is_source:
    np.frombuffer(heap, np.uint8)[4096::4096] = 1
last = memoryview(heap)[:8]
workload.attach(socket)
is_first = True
while True:
    with workload.active():
        now = time.monotonic_ns()
        if is_first:
            before = int.from_bytes(last, "little")
            with open(report, "w") as file:
                file.write(str(now - before if before else 0))
            is_first = False
        last[:] = now.to_bytes(8, "little")
        state.steps += 1
    time.sleep(0.0001)
"""


async def events_ms(source: PeerProcess, destination: PeerProcess) -> float:
    """From the source's STOP to the destination's RESUME."""
    times = {}
    deadline = time.monotonic() + WAIT_S
    for name, peer in (("STOP", source), ("RESUME", destination)):
        while not any(event["event"] == name for event in peer.events):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {name}")
            await asyncio.sleep(0.01)
        [stamp] = [e["timestamp"] for e in peer.events if e["event"] == name][-1:]
        times[name] = stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3
    return float(times["RESUME"] - times["STOP"])


async def wait_for(path: Path) -> str:
    """The text of a file, when it has one."""
    deadline = time.monotonic() + WAIT_S
    while not (path.exists() and (text := path.read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing in {path}")
        await asyncio.sleep(0.01)
    return text


def start_workload(socket: Path, mib: int, report: Path, role: str) -> "subprocess.Popen[bytes]":
    """The workload that looks at its own gap."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKLOAD, str(socket), str(mib), str(report), role]
    )


async def hand_over(source: PeerProcess, directory: Path) -> None:
    """Start the cpr-transfer and wait for its end."""
    await source.set_capabilities({"events": True, "return-path": True})
    await source.set_parameters({"mode": "cpr-transfer"})
    channels = [channel("main", directory / "main"), channel("cpr", directory / "cpr")]
    await source.execute("migrate", {"channels": channels})
    await source.wait_migration("completed")


async def between_workloads(mib: int) -> tuple[float, float]:
    """One transfer.

    Returns:
        STOP to RESUME, and the workload's gap, both in milliseconds.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        here, there = directory / "here", directory / "there"
        processes = []
        try:
            async with (
                await DaemonProcess.start(arguments=["-guest", f"attach:{here}"]) as source,
                await DaemonProcess.start(
                    incoming=f"unix:{directory}/main",
                    arguments=["-guest", f"attach:{there}", *incoming_arguments(directory / "cpr")],
                ) as destination,
            ):
                processes.append(start_workload(here, mib, directory / "first", "source"))
                processes.append(start_workload(there, mib, directory / "gap", "destination"))
                await wait_for(directory / "first")
                await source.wait_run_state("running")
                await asyncio.sleep(0.2)
                await hand_over(source, directory)
                gap_ms = int(await wait_for(directory / "gap")) / 1e6
                await destination.wait_run_state("running")
                return await events_ms(source, destination), gap_ms
        finally:
            for process in processes:
                process.kill()
                process.wait()


async def between_qemus(binary: str, mib: int) -> float:
    """One transfer; STOP to RESUME in milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        async def start(incoming: str | None, *arguments: str) -> QemuProcess:
            backend = f"memory-backend-memfd,id=ram0,size={mib}M,share=on"
            return await QemuProcess.start(
                binary,
                machine="pc,aux-ram-share=on,memory-backend=ram0",
                memory_mib=mib,
                guest=GUEST,
                incoming=incoming,
                arguments=(
                    "-object",
                    backend + ("" if incoming else ",prealloc=on"),
                    *arguments,
                ),
                timeout_s=WAIT_S,
            )

        async with await start(None) as source:
            await source.wait_serial(2)
            later = asyncio.create_task(
                start(f"unix:{directory}/main", *incoming_arguments(directory / "cpr"))
            )
            while not os.path.exists(directory / "cpr"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            moving = asyncio.create_task(hand_over(source, directory))
            async with await later as destination:
                await destination.wait_run_state("running")
                await moving
                # The monitor opened when it ran, or was about to: its event may be lost.
                text = await source.query_migrate()
                if not any(event["event"] == "RESUME" for event in destination.events):
                    return float(str(text["downtime"]))
                return await events_ms(source, destination)


async def run(sizes: list[int], versions: list[str], reps: int) -> None:
    """Measure and print."""
    print(f"cpr-transfer, medians of {reps} interleaved repetitions (least..most), milliseconds")
    print(f"{'guest RAM':<12}{'between':<14}{'STOP to RESUME':>28}{'gap of the workload':>28}")
    binaries = [(version, find_qemu(version)) for version in versions]
    for mib in sizes:
        stops: dict[str, list[float]] = {}
        gaps: list[float] = []
        for _ in range(reps):
            stop, gap = await between_workloads(mib)
            stops.setdefault("workloads", []).append(stop)
            gaps.append(gap)
            for version, binary in binaries:
                if binary is not None:
                    taken = stops.setdefault(f"QEMU {version}", [])
                    taken.append(await between_qemus(binary, mib))
        for who, taken in stops.items():
            note = _spread(gaps) if who == "workloads" else ""
            is_met = median(taken) <= STANDSTILL_GOAL_MS
            goal = "" if who != "workloads" else " ok" if is_met else " --"
            print(f"{mib:>6} MiB  {who:<14}{_spread(taken) + goal:>28}{note:>28}")


def _spread(taken: list[float]) -> str:
    return f"{median(taken):.1f} ({min(taken):.1f}..{max(taken):.1f})"


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpr", description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--mib", default="256,1024,4096", help="sizes of the guest")
    parser.add_argument("--qemu", default="10.0,11.1", help="releases to compare with")
    options = parser.parse_args()
    sizes = [int(text) for text in options.mib.split(",")]
    versions = [text for text in options.qemu.split(",") if text]
    for version in versions:
        if (binary := find_qemu(version)) is not None:
            assert qemu_version(binary) == version
    asyncio.run(run(sizes, versions, options.reps))
    return 0


if __name__ == "__main__":
    sys.exit(main())

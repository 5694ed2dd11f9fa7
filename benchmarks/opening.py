"""Opening parked mapped-ram files of large guests, whose memory is mostly holes.

    python -m benchmarks.opening [--sizes GIB,...] [--reps N] [--qemu BINARY] [--directory DIR]

Files are written by a QEMU that has hardly touched its memory, and opened by a QEMU and by a
daemon, each started anew, in turns. What is timed is ``migrate-incoming`` to the event
that says completed: with migrationd the guest can be looked at and sent then.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.measure import Taken, median, timed
from benchmarks.ratios import verdict
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

GUEST = BootGuest(counted_pages=256, pages_per_s=1000)
GOAL_MS = 30.0


async def start_qemu(binary: str, size_gib: int, incoming: str | None) -> QemuProcess:
    """A QEMU that may have more memory than the host: it does not touch it."""
    memory = f"memory-backend-ram,id=ram0,size={size_gib}G,reserve=off"
    return await QemuProcess.start(
        binary,
        machine="pc,memory-backend=ram0",
        memory_mib=size_gib << 10,
        guest=GUEST,
        arguments=["-object", memory],
        incoming=incoming,
        timeout_s=60,
    )


async def save(binary: str, size_gib: int, path: Path) -> None:
    """Write the file."""
    async with await start_qemu(binary, size_gib, None) as source:
        await source.wait_serial(2)
        await source.set_capabilities({"events": True, "mapped-ram": True})
        await source.set_parameters({"max-bandwidth": 0})
        await timed(source, "migrate", {"uri": f"file:{path}"})


async def load(loader: PeerProcess, path: Path) -> Taken:
    """Open the file."""
    async with loader:
        await loader.set_capabilities({"events": True, "mapped-ram": True})
        return await timed(loader, "migrate-incoming", {"uri": f"file:{path}"})


async def run(binary: str, sizes_gib: tuple[int, ...], reps: int, directory: Path) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)}, files in {directory}, {reps} interleaved repetitions, "
          f"medians (least..most)")  # fmt: skip
    path = directory / "migrationd-benchmark.mapped-ram"
    for size_gib in sizes_gib:
        taken: dict[str, list[Taken]] = {"QEMU": [], "migrationd": []}
        try:
            await save(binary, size_gib, path)
            used_mib = path.stat().st_blocks * 512 >> 20
            for _ in range(reps):
                qemu = await start_qemu(binary, size_gib, "defer")
                taken["QEMU"].append(await load(qemu, path))
                daemon = await DaemonProcess.start(incoming="defer")
                taken["migrationd"].append(await load(daemon, path))
        finally:
            path.unlink(missing_ok=True)
        print(f"{size_gib} GiB, {used_mib} MiB on the disk")
        for name, samples in taken.items():
            walls = [sample.wall_s * 1e3 for sample in samples]
            ok = verdict(median(walls) < GOAL_MS) if name == "migrationd" else ""
            print(f"  {name:<12}{median(walls):8.1f} ms ({min(walls):.1f}..{max(walls):.1f}), "
                  f"{median(sample.cpu_s for sample in samples):.2f} CPU s{ok}")  # fmt: skip


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opening", description=__doc__)
    parser.add_argument("--sizes", default="4,64", metavar="GIB", help="several by commas")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--qemu", default=find_qemu("11.1") or find_qemu("10.0"))
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    if options.qemu is None:
        parser.error("mapped-ram needs QEMU 9.0 or later: tests/support/install-qemus")
    sizes_gib = tuple(int(size) for size in options.sizes.split(","))
    asyncio.run(run(options.qemu, sizes_gib, options.reps, options.directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())

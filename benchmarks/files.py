"""mapped-ram files beside QEMU's: save, with and without direct-io, and load.

    python -m benchmarks.files [--reps N] [--memory MIB] [--qemu BINARY] [--directory DIR]

Saves are interleaved with those of a QEMU that holds the same guest, and with direct
writes of the same size by one loop of ``pwrite``: what the disk gives at that moment. Each of
them is first in its turn: a disk is slower at first after a pause.
migrationd syncs a file before it says that the migration completed, QEMU does not; where
nothing is said of it, migrationd's times include the sync and QEMU's do not.
"""

import argparse
import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Taken, fill_guest, median, timed, warm_memory
from benchmarks.peers import CONTENTS
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

GUEST = BootGuest(counted_pages=256, pages_per_s=1000)
CHUNK_BYTES = 4 << 20
RATE_GOAL = 3.0
CPU_GOAL = 0.3
DISK_GOAL = 0.8
LOAD_GOAL = 1.0


@dataclass(frozen=True, slots=True)
class Kind:
    """How a file is written."""

    name: str
    multifd: bool = False
    direct_io: bool = False


KINDS = (
    Kind("single"),
    Kind("multifd 2", multifd=True),
    Kind("multifd 2, direct-io", multifd=True, direct_io=True),
)


async def save(peer: PeerProcess, path: Path, kind: Kind) -> Taken:
    """Save a guest and wait until it is done."""
    await peer.set_capabilities({"events": True, "mapped-ram": True, "multifd": kind.multifd})
    await peer.set_parameters({"max-bandwidth": 0, "direct-io": kind.direct_io})
    taken = await timed(peer, "migrate", {"uri": f"file:{path}"})
    if isinstance(peer, QemuProcess):
        await peer.wait_run_state("postmigrate")
        await peer.execute("cont")
        await peer.execute("stop")
    return taken


def disk_rate(path: Path, size_bytes: int) -> float:
    """Bytes per second of direct writes from one thread."""
    with mmap.mmap(-1, CHUNK_BYTES) as area:
        area[:] = os.urandom(CHUNK_BYTES)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
            start = time.perf_counter()
            for position in range(0, size_bytes, CHUNK_BYTES):
                os.pwrite(fd, area, position)
            return size_bytes / (time.perf_counter() - start)
        finally:
            os.close(fd)
            path.unlink()


class Files:
    """A QEMU and a daemon that hold the same guest.

    Args:
        binary: QEMU 9.0 or later.
        memory_mib: Guest RAM.
        content: One of ``CONTENTS``.
        directory: Where files go.
    """

    def __init__(self, binary: str, memory_mib: int, content: str, directory: Path) -> None:
        self._binary = binary
        self._memory_mib = memory_mib
        self._content = content
        self._path = directory / "migrationd-benchmark.mapped-ram"

    @contextlib.asynccontextmanager
    async def holders(self) -> AsyncIterator[dict[str, PeerProcess]]:
        """Both, by name."""
        async with (
            await self._qemu(None) as source,
            await DaemonProcess.start(
                incoming="tcp:127.0.0.1:0", arguments=["-log-level", "warning", "-keep"]
            ) as daemon,
        ):
            await source.wait_serial(2)
            await source.execute("stop")
            memory = self._memory_mib << 20
            fill_guest(source.pid, memory, GUEST.needed_bytes, self._content)
            await source.migrate(await daemon.listening_uri())
            await source.wait_migration(timeout_s=120)
            await daemon.wait_migration()
            await source.set_capabilities({"return-path": False})
            await source.wait_run_state("postmigrate")
            await source.execute("cont")
            await source.execute("stop")
            yield {"QEMU": source, "migrationd": daemon}

    async def saved(self, peer: PeerProcess, kind: Kind) -> Taken:
        """One save; the file is gone afterwards."""
        warm_memory((self._memory_mib + 256) << 20)
        try:
            return await save(peer, self._path, kind)
        finally:
            self._path.unlink(missing_ok=True)

    async def loads(self, peer: PeerProcess) -> dict[str, Taken]:
        """Load the file that a peer saves, by QEMU and by migrationd."""
        await save(peer, self._path, KINDS[0])
        taken = {}
        try:
            for name in ("QEMU", "migrationd"):
                warm_memory((self._memory_mib + 256) << 20)
                async with await (
                    self._qemu("defer") if name == "QEMU" else DaemonProcess.start(incoming="defer")
                ) as loader:
                    await loader.set_capabilities({"events": True, "mapped-ram": True})
                    uri = {"uri": f"file:{self._path}"}
                    taken[name] = await timed(loader, "migrate-incoming", uri)
        finally:
            self._path.unlink(missing_ok=True)
        return taken

    def disk(self) -> float:
        """What the disk gives now, bytes per second."""
        return disk_rate(self._path, self._memory_mib << 20)

    async def _qemu(self, incoming: str | None) -> QemuProcess:
        size = f"{self._memory_mib}M"
        return await QemuProcess.start(
            self._binary,
            machine="pc,memory-backend=ram0",
            memory_mib=self._memory_mib,
            guest=GUEST,
            arguments=["-object", f"memory-backend-ram,id=ram0,size={size},prealloc=on"],
            incoming=incoming,
            timeout_s=60,
        )


async def run(binary: str, memory_mib: int, reps: int, directory: Path) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)}, {memory_mib} MiB, files in {directory}, "
          f"{reps} interleaved repetitions, medians")  # fmt: skip
    for content in CONTENTS:
        files = Files(binary, memory_mib, content, directory)
        # Of a guest that is half zero, half is written.
        payload = (memory_mib << 20) / (2 if content == "half zero" else 1)
        async with files.holders() as holders:
            print(f"\n{content}")
            for kind in KINDS:
                await _report_saves(files, holders, kind, payload, reps)
            await _report_loads(files, holders, reps)


async def _report_saves(
    files: Files, holders: dict[str, PeerProcess], kind: Kind, payload: float, reps: int
) -> None:
    taken: dict[str, list[Taken]] = {name: [] for name in holders}
    disk = []
    order = ["disk", *holders]
    for number in range(reps):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            if name == "disk":
                disk.append(files.disk())
            else:
                taken[name].append(await files.saved(holders[name], kind))
    for name, samples in taken.items():
        wall, cpu = (median(getattr(s, field) for s in samples) for field in ("wall_s", "cpu_s"))
        print(f"  save {kind.name:22} {name:11} {payload / wall / 1e9:5.2f} GB/s of pages, "
              f"{cpu:5.2f} CPU s")  # fmt: skip
    pairs = list(zip(taken["QEMU"], taken["migrationd"], disk, strict=True))
    rate = median(q.wall_s / m.wall_s for q, m, _ in pairs)
    cpu = median(m.cpu_s / max(q.cpu_s, 0.01) for q, m, _ in pairs)
    share = median(payload / m.wall_s / d for _, m, d in pairs)
    other = median(m.other_cpus for _, m, _ in pairs)
    print(f"       {'':22} rate ×{rate:.2f} (goal {RATE_GOAL}), CPU ×{cpu:.2f} (goal {CPU_GOAL}), "
          f"{share:.0%} of the disk's {median(disk) / 1e9:.2f} GB/s (goal {DISK_GOAL:.0%} with "
          f"direct-io); others used {other:.2f} CPUs")  # fmt: skip


async def _report_loads(files: Files, holders: dict[str, PeerProcess], reps: int) -> None:
    taken = [await files.loads(holders["QEMU"]) for _ in range(reps)]
    for name in holders:
        wall = median(sample[name].wall_s for sample in taken)
        cpu = median(sample[name].cpu_s for sample in taken)
        print(f"  load {'':22} {name:11} {wall * 1000:7.1f} ms, {cpu:5.2f} CPU s")
    rate = median(sample["QEMU"].wall_s / sample["migrationd"].wall_s for sample in taken)
    print(f"       {'':22} rate ×{rate:.1f} (goal {LOAD_GOAL}): it is mapped, not read")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--qemu", default=find_qemu("11.1") or find_qemu("10.0"))
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    if options.qemu is None:
        parser.error("mapped-ram needs QEMU 9.0 or later: tests/support/install-qemus")
    asyncio.run(run(options.qemu, options.memory, options.reps, options.directory))


if __name__ == "__main__":
    main()

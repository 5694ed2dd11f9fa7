"""QEMU and migrationd as source and as destination, interleaved in one run.

    python -m benchmarks [--reps N] [--memory MIB] [--qemu BINARY]

Prints medians, and ratios to QEMU -> QEMU of the same repetition. Single figures are
worth nothing on a shared machine; ratios of one run are what to look at.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from benchmarks.measure import (
    Sample,
    StatusProbe,
    idle_resident_bytes,
    median,
    migrate,
    percentile,
    resident_bytes,
    start_to_greeting_s,
    warm_memory,
)
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

PAIRS = (("QEMU", "QEMU"), ("QEMU", "migrationd"), ("migrationd", "QEMU"), ("migrationd",) * 2)
CONTENTS = ("random", "half zero")


class Bench:
    """The peers of one content: both sources stay, destinations come and go."""

    def __init__(self, binary: str, memory_mib: int, content: str) -> None:
        self._binary = binary
        self._memory_mib = memory_mib
        pages = memory_mib * 256 - 4096
        if content == "half zero":
            pages = memory_mib * 128
        self._guest = BootGuest(counted_pages=256, filled_pages=pages, pages_per_s=1000)
        self._stack = contextlib.AsyncExitStack()
        self._sources: dict[str, PeerProcess] = {}
        self.latencies: list[float] = []
        self.beyond_guest_bytes: list[int] = []

    async def __aenter__(self) -> "Bench":
        """Start both sources: a QEMU with a filled guest, and a daemon that was given it."""
        source = await self._qemu(None)
        await self._stack.enter_async_context(source)
        await source.wait_serial(2, timeout_s=120)
        await source.execute("stop")
        daemon = await self._daemon(["-keep"])
        await self._stack.enter_async_context(daemon)
        self._sources = {"QEMU": source, "migrationd": daemon}
        await migrate(source, daemon, await daemon.listening_uri())
        await self._again(source)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop everything."""
        await self._stack.aclose()

    async def sample(self, source_kind: str, destination_kind: str) -> Sample:
        """One migration."""
        warm_memory((self._memory_mib + 256) << 20)
        source = self._sources[source_kind]
        destination: PeerProcess
        if destination_kind == "QEMU":
            destination = await self._qemu("tcp:127.0.0.1:0")
        else:
            destination = await self._daemon([])
        async with destination:
            probe = self._probe(source, destination)
            warm_memory((self._memory_mib + 256) << 20)
            uri = await destination.listening_uri()
            if probe is not None:
                probe.start()
            result = await migrate(source, destination, uri)
            if probe is not None:
                self.latencies += await probe.stop()
            if destination_kind == "migrationd":
                beyond = resident_bytes(destination.pid) - (self._memory_mib << 20)
                self.beyond_guest_bytes.append(beyond)
        if source_kind == "QEMU":
            await self._again(source)
        return result

    def _probe(self, *peers: PeerProcess) -> StatusProbe | None:
        for peer in peers:
            if isinstance(peer, DaemonProcess):
                return StatusProbe(f"{peer.directory}/probe.sock")
        return None

    async def _again(self, source: PeerProcess) -> None:
        """Let a QEMU whose guest has left have it back, stopped."""
        await source.execute("cont")
        await source.execute("stop")

    async def _qemu(self, incoming: str | None) -> QemuProcess:
        size = f"{self._memory_mib}M"
        return await QemuProcess.start(
            self._binary,
            machine="pc,memory-backend=ram0",
            memory_mib=self._memory_mib,
            guest=self._guest,
            arguments=["-object", f"memory-backend-ram,id=ram0,size={size},prealloc=on"],
            incoming=incoming,
            timeout_s=60,
        )

    async def _daemon(self, arguments: Sequence[str]) -> DaemonProcess:
        directory = DaemonProcess.make_directory()
        self._stack.callback(lambda: _remove(directory))
        daemon = await DaemonProcess.start(
            incoming="tcp:127.0.0.1:0",
            arguments=["-log-level", "warning", *arguments, *self._probe_monitor(directory)],
        )
        (daemon.directory / "probe.sock").symlink_to(directory / "probe.sock")
        return daemon

    @staticmethod
    def _probe_monitor(directory: object) -> list[str]:
        return ["-qmp", f"unix:{directory}/probe.sock,server=on,wait=off"]


def _remove(directory: object) -> None:
    import shutil

    shutil.rmtree(str(directory), ignore_errors=True)


async def run(binary: str, memory_mib: int, reps: int) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)}, {memory_mib} MiB, tcp, no bandwidth limit, "
          f"{reps} interleaved repetitions")  # fmt: skip
    latencies: list[float] = []
    beyond: list[int] = []
    for content in CONTENTS:
        samples: dict[tuple[str, str], list[Sample]] = {pair: [] for pair in PAIRS}
        async with Bench(binary, memory_mib, content) as bench:
            for rep in range(reps):
                order = PAIRS if rep % 2 == 0 else PAIRS[::-1]
                for pair in order:
                    samples[pair].append(await bench.sample(*pair))
            latencies += bench.latencies
            beyond += bench.beyond_guest_bytes
        _print_table(content, memory_mib, samples)
    greeting = median([start_to_greeting_s() for _ in range(5)])
    idle = await idle_resident_bytes()
    print(f"\nquery-status while RAM flows: p50 {percentile(latencies, 0.5) * 1e3:.2f} ms, "
          f"p99 {percentile(latencies, 0.99) * 1e3:.2f} ms ({len(latencies)} asked)")  # fmt: skip
    print(f"start to greeting: {greeting * 1e3:.0f} ms; resident idle: {idle / 1e6:.1f} MB; "
          f"beyond the guest's RAM after loading: {max(beyond) / 2**20:.0f} MiB")  # fmt: skip


def _print_table(
    content: str, memory_mib: int, samples: dict[tuple[str, str], list[Sample]]
) -> None:
    base = samples[PAIRS[0]]
    print(f"\n{content}: medians, and in brackets the median ratio to QEMU -> QEMU")
    print(f"{'pair':<26}{'GB/s of guest RAM':>20}{'CPU s source':>20}{'CPU s destination':>20}")
    for pair, taken in samples.items():
        rate = median([(memory_mib << 20) / item.wall_s / 1e9 for item in taken])
        rate_ratio = median([b.wall_s / a.wall_s for a, b in zip(taken, base, strict=True)])
        cells = [f"{rate:.2f} ({rate_ratio:.2f})"]
        for name in ("source_cpu_s", "destination_cpu_s"):
            value = median([getattr(item, name) for item in taken])
            ratio = median(
                [getattr(a, name) / max(getattr(b, name), 0.01)
                 for a, b in zip(taken, base, strict=True)]
            )  # fmt: skip
            cells.append(f"{value:.2f} ({ratio:.2f})")
        print(f"{' -> '.join(pair):<26}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--memory", type=int, default=1024, help="guest memory, MiB")
    parser.add_argument("--qemu", default=find_qemu(), help="QEMU binary")
    options = parser.parse_args()
    if options.qemu is None:
        print("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
        return 1
    asyncio.run(run(options.qemu, options.memory, options.reps))
    return 0


sys.exit(main())

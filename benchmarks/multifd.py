"""multifd between QEMU and migrationd, interleaved in one run.

    python -m benchmarks.multifd [--reps N] [--memory MIB,...] [--qemu BINARY]
                                 [--cells CHANNELS:METHOD:CONTENT,...]

Prints medians, and ratios to QEMU -> QEMU of the same repetition; figures of a busy
machine are worth nothing. Contents: ``random``, ``half zero``, ``zero``, ``compressible``.
QEMU's destination has its memory before the migration begins (``prealloc=on``); a daemon
learns then how much it needs, so its figures hold the kernel's work of giving it, a tenth of a
CPU second per GiB where pages are at hand and many times that where they are not. QEMU 7.2
counts compressed packets as if they were not. With several sizes of memory (``--memory
1024,2048,4096,8192``) a last table shows how the cost grows: it is to be linear.
"""

import argparse
import asyncio
import sys
from dataclasses import dataclass

from benchmarks.measure import Sample, median
from benchmarks.peers import Bench
from benchmarks.ratios import BASE, PAIRS, Pair, costs, rate, verdict
from migrationd.ctl.qemu_process import find_qemu, qemu_version

RATE_GOALS: dict[Pair, float] = {PAIRS[1]: 1.0, PAIRS[2]: 1.2, PAIRS[3]: 1.2}
"""Beside a QEMU that copies pages, as 7.2."""

LIMIT_RATE_GOAL = 1.0
"""Beside one that is at the machine's own limit, and with compression."""
ZERO_RATE_GOAL = 1.3
CPU_GOAL = 0.8
"""At most so many times QEMU's CPU seconds at the same end."""

BYTES_GOAL = 0.02
"""Compressed bytes differ from QEMU's by at most this share."""

BEYOND_GOAL_MIB = 150


@dataclass(frozen=True, slots=True)
class Cell:
    """What one table measures."""

    channels: int
    method: str
    content: str

    def rate_goal(self, pair: Pair, *, is_old: bool) -> float:
        """At least so many times the rate of QEMU -> QEMU."""
        if self.method != "none":
            return LIMIT_RATE_GOAL
        if self.content == "zero" and pair[0] == "migrationd":
            return ZERO_RATE_GOAL
        return RATE_GOALS[pair] if is_old else LIMIT_RATE_GOAL


CELLS = (
    Cell(2, "none", "random"),
    Cell(4, "none", "random"),
    Cell(8, "none", "random"),
    Cell(2, "none", "half zero"),
    Cell(2, "none", "zero"),
    Cell(2, "zstd", "compressible"),
    Cell(2, "zlib", "compressible"),
)


async def run_sizes(
    binary: str, sizes_mib: tuple[int, ...], reps: int, cells: tuple[Cell, ...]
) -> None:
    """Measure guests of each size and print; how the cost grows, if there are several."""
    grown: dict[Cell, dict[int, dict[Pair, list[Sample]]]] = {cell: {} for cell in cells}
    version = qemu_version(binary)
    is_old = int(version.split(".")[0]) < 8
    for memory_mib in sizes_mib:
        print(f"QEMU {version}, {memory_mib} MiB, tcp, {reps} interleaved repetitions")
        for cell in cells:
            samples = await measure(binary, memory_mib, reps, cell, is_old=is_old)
            grown[cell][memory_mib] = samples
    if len(sizes_mib) > 1:
        for cell in cells:
            print_growth(cell, grown[cell])


async def measure(
    binary: str, memory_mib: int, reps: int, cell: Cell, *, is_old: bool
) -> dict[Pair, list[Sample]]:
    """Measure one cell and print its table."""
    samples: dict[Pair, list[Sample]] = {pair: [] for pair in PAIRS}
    async with Bench(binary, memory_mib, cell.content, cell.channels, cell.method) as bench:
        for rep in range(reps):
            for pair in PAIRS if rep % 2 == 0 else PAIRS[::-1]:
                samples[pair].append(await bench.sample(*pair))
        beyond = bench.beyond_guest_bytes
    print_table(cell, memory_mib, samples, is_old=is_old)
    if beyond:
        peak_mib = max(beyond) / 2**20
        print(f"peak resident memory beyond the guest's RAM {peak_mib:.0f} MiB"
              f"{verdict(peak_mib < BEYOND_GOAL_MIB)}")  # fmt: skip
    return samples


def print_table(
    cell: Cell, memory_mib: int, samples: dict[Pair, list[Sample]], *, is_old: bool
) -> None:
    """Print one cell's rates, costs and sizes; an old QEMU counts pages, not what they become."""
    print(f"\n{cell.channels} channels, {cell.method}, {cell.content}")
    print(f"{'pair':<26}{'GB/s of guest RAM':>32}{'CPU s source':>18}{'CPU s destination':>20}"
          f"{'MB on the wire':>18}")  # fmt: skip
    base = samples[BASE]
    for pair, taken in samples.items():
        goal = cell.rate_goal(pair, is_old=is_old) if pair != BASE else None
        text = rate(taken, base, memory_mib, goal)
        source, destination = costs(pair, taken, base, (CPU_GOAL, CPU_GOAL))
        sent = median(s.wire_bytes for s in taken)
        size = f"{sent / 1e6:.1f}"
        if pair[0] == "migrationd" and cell.method != "none" and not is_old:
            share = sent / median(s.wire_bytes for s in base)
            size += f" x {share:.3f}{verdict(abs(share - 1) <= BYTES_GOAL)}"
        print(f"{' -> '.join(pair):<26}{text:>32}{source:>18}{destination:>20}{size:>18}")
    busy = median(s.other_cpus for taken in samples.values() for s in taken)
    print(f"others used {busy:.2f} CPUs")


def print_growth(cell: Cell, grown: dict[int, dict[Pair, list[Sample]]]) -> None:
    """Print what a GiB takes in guests of several sizes."""
    print(f"\n{cell.channels} channels, {cell.method}, {cell.content}: per GiB of guest RAM")
    print(f"{'pair':<26}{'MiB':>8}{'seconds':>12}{'CPU s source':>16}{'CPU s destination':>20}")
    for pair in PAIRS:
        for memory_mib, samples in grown.items():
            gib = memory_mib / 1024
            wall, source, destination = (
                median(figure) / gib
                for figure in (
                    [s.wall_s for s in samples[pair]],
                    [s.source_cpu_s for s in samples[pair]],
                    [s.destination_cpu_s for s in samples[pair]],
                )
            )
            print(f"{' -> '.join(pair):<26}{memory_mib:>8}{wall:>12.3f}{source:>16.3f}"
                  f"{destination:>20.3f}")  # fmt: skip


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes of ``1024,4096``."""
    return tuple(int(item) for item in text.split(","))


def parse_cells(text: str) -> tuple[Cell, ...]:
    """Cells of ``2:none:random,4:zstd:compressible``."""
    cells = []
    for item in text.split(","):
        channels, method, content = item.split(":")
        cells.append(Cell(int(channels), method, content))
    return tuple(cells)


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multifd", description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument(
        "--memory", type=parse_sizes, default=(1024,), help="guest memory, MiB; several by commas"
    )
    parser.add_argument("--qemu", default=find_qemu(), help="QEMU binary")
    parser.add_argument("--cells", type=parse_cells, default=CELLS)
    options = parser.parse_args()
    if options.qemu is None:
        print("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
        return 1
    asyncio.run(run_sizes(options.qemu, options.memory, options.reps, options.cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())

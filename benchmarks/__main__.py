"""QEMU and migrationd as source and as destination, interleaved in one run.

    python -m benchmarks [--reps N] [--memory MIB] [--prealloc on|off] [--qemu BINARY]

Prints medians, and ratios to QEMU -> QEMU of the same repetition. Single figures are
worth nothing on a shared machine; ratios of one run are what to look at, and only those
of a run in which nothing else used the CPUs.
"""

import argparse
import asyncio
import sys

from benchmarks.measure import (
    Sample,
    idle_resident_bytes,
    median,
    percentile,
    start_to_greeting_s,
)
from benchmarks.peers import CONTENTS, Bench
from benchmarks.ratios import BASE, PAIRS, Pair, costs, rate, warn_if_busy
from migrationd.ctl.qemu_process import find_qemu, qemu_version

RATE_GOALS = {
    ("random", PAIRS[1]): 1.0,
    ("random", PAIRS[2]): 1.3,
    ("random", PAIRS[3]): 1.2,
    ("half zero", PAIRS[1]): 1.0,
    ("half zero", PAIRS[2]): 1.3,
    ("half zero", PAIRS[3]): 1.3,
}
"""At least so many times the rate of QEMU -> QEMU."""

SOURCE_CPU_GOAL = 0.9
DESTINATION_CPU_GOAL = 1.1
"""At most so many times QEMU's CPU seconds at the same end."""

PROBED = (("QEMU", "migrationd"), ("migrationd", "QEMU"))


async def run(binary: str, memory_mib: int, reps: int, *, prealloc: bool) -> None:
    """Measure and print."""
    memory = "preallocated memory" if prealloc else "memory made as it is touched"
    print(f"QEMU {qemu_version(binary)}, {memory_mib} MiB, tcp, no bandwidth limit, "
          f"destinations with {memory}, {reps} interleaved repetitions")  # fmt: skip
    latencies: dict[Pair, list[float]] = {pair: [] for pair in PROBED}
    beyond: list[int] = []
    for content in CONTENTS:
        samples: dict[Pair, list[Sample]] = {pair: [] for pair in PAIRS}
        async with Bench(binary, memory_mib, content, prealloc=prealloc) as bench:
            for rep in range(reps):
                for pair in PAIRS if rep % 2 == 0 else PAIRS[::-1]:
                    samples[pair].append(await bench.sample(*pair))
            for pair in PROBED * 2:
                await bench.sample(*pair, latencies=latencies[pair])
            beyond += bench.beyond_guest_bytes
        print_table(content, memory_mib, samples)
    print("\nquery-status while RAM flows at full rate (goal: p99 < 5 ms)")
    for pair, taken in latencies.items():
        print(f"{' -> '.join(pair):<26}p50 {percentile(taken, 0.5) * 1e3:.2f} ms, p99 "
              f"{percentile(taken, 0.99) * 1e3:.2f} ms, worst {max(taken) * 1e3:.2f} ms "
              f"of {len(taken)}")  # fmt: skip
    greeting = median(start_to_greeting_s() for _ in range(7))
    idle = await idle_resident_bytes()
    print(f"\nstart to greeting {greeting * 1e3:.0f} ms (goal: < 250); resident idle "
          f"{idle / 1e6:.1f} MB (goal: < 60)")  # fmt: skip
    print(f"peak resident memory beyond the guest's RAM {max(beyond) / 2**20:.0f} MiB "
          f"(goal: < 100)")  # fmt: skip


def print_table(content: str, memory_mib: int, samples: dict[Pair, list[Sample]]) -> None:
    """Print one content's rates and costs."""
    print(f"\n{content}: medians; x is the median ratio to QEMU -> QEMU, least and most behind it")
    print(f"{'pair':<26}{'GB/s of guest RAM':>30}{'CPU s source':>18}{'CPU s destination':>20}")
    base = samples[BASE]
    for pair, taken in samples.items():
        text = rate(taken, base, memory_mib, RATE_GOALS.get((content, pair)))
        source, destination = costs(pair, taken, base, (SOURCE_CPU_GOAL, DESTINATION_CPU_GOAL))
        print(f"{' -> '.join(pair):<26}{text:>30}{source:>18}{destination:>20}")
    warn_if_busy([s.other_cpus for taken in samples.values() for s in taken])


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--memory", type=int, default=1024, help="guest memory, MiB")
    parser.add_argument("--prealloc", choices=("on", "off"), default="on",
                        help="destinations have their memory before the source comes (on): "
                        "QEMU's prealloc=on, migrationd's -ram-prealloc")  # fmt: skip
    parser.add_argument("--qemu", default=find_qemu(), help="QEMU binary")
    options = parser.parse_args()
    if options.qemu is None:
        print("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
        return 1
    asyncio.run(run(options.qemu, options.memory, options.reps, prealloc=options.prealloc == "on"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

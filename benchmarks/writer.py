"""A workload that writes its memory at a rate and measures how long it stood still.

    python -m benchmarks.writer SOCKET REPORT --mib 1024 --range-mib 256 --rate-mb-s 204

One word in each page of a range, in order, over and over; the rest of its memory holds random
bytes, or nothing. Its clock is the host's, which its source and its destination share: the
first tick after it moved tells how long nothing was written.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from migrationd.workload import VMState, Workload, u64

PAGE = 4096
TICK_S = 0.001


class State:
    """What travels.

    Attributes:
        at: Page that is written next.
        last_ns: When the last tick was, on the monotonic clock of the host.
    """

    def __init__(self) -> None:
        self.at = 0
        self.last_ns = 0


STATE = VMState("writer", fields=(u64("at"), u64("last_ns")))


def main() -> None:
    """Write until the daemon says quit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("report", type=Path)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--range-mib", type=int, default=256)
    parser.add_argument("--rate-mb-s", type=float, default=0.0)
    parser.add_argument("--fill", choices=("random", "range", "none"), default="random")
    options = parser.parse_args()
    state, moved = State(), [False]
    workload = Workload("writer", on_loaded=lambda: moved.__setitem__(0, True))
    memory = np.frombuffer(workload.add_block("heap", options.mib << 20), np.uint8)
    workload.add_device(STATE, state)
    filled = {"random": len(memory), "range": options.range_mib << 20, "none": 0}[options.fill]
    source = np.random.default_rng(1)
    for begin in range(0, filled, 1 << 24):
        memory[begin : begin + (1 << 24)] = np.frombuffer(source.bytes(1 << 24), np.uint8)
    words = memory.view(np.uint64).reshape(-1, PAGE // 8)
    pages = min(options.range_mib << 20, len(memory)) // PAGE
    rate = options.rate_mb_s * 1e6 / PAGE
    workload.attach(options.socket)
    due, owed = time.monotonic(), 0.0
    while True:
        with workload.active():
            now_ns = time.monotonic_ns()
            if moved[0]:
                moved[0] = False
                options.report.write_text(str((now_ns - state.last_ns) / 1e6))
            owed = min(owed + rate * TICK_S, rate * 20 * TICK_S)
            count = int(owed)
            owed -= count
            first = min(count, pages - state.at)
            words[state.at : state.at + first, 0] += 1
            words[: count - first, 0] += 1
            state.at = (state.at + count) % pages
            state.last_ns = now_ns
        due = max(due + TICK_S, now_ns / 1e9 - 2 * TICK_S)
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)


if __name__ == "__main__":
    main()

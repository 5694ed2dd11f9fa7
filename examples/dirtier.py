"""A workload that keeps writing its memory and can tell whether any of it was lost.

    python examples/dirtier.py SOCKET [--mib 64] [--rate-mb-s 200] [--report FILE]

A pass writes the number of the pass into each page of a block. A page therefore holds
the present pass or the one before, and everything behind the place where the writer is
holds the one before. The pass, and the place, are a device's state: they travel too.
"""

import argparse
import json
import os
import time
from pathlib import Path

from migrationd.workload import VMState, Workload, u32, u64

PAGE = 4096
PAGES_A_STEP = 64


class Dirtier:
    """Where the writer is.

    Attributes:
        passes: Number of the present pass, from 1.
        at: Page that is written next.
        mistakes: Pages that held something that they should not.
    """

    def __init__(self) -> None:
        self.passes = 1
        self.at = 0
        self.mistakes = 0


STATE = VMState("dirtier", fields=(u64("passes"), u64("at"), u32("mistakes")))


def step(state: Dirtier, memory: memoryview, pages: int) -> None:
    """Check and write some pages."""
    expected = (state.passes - 1).to_bytes(8, "little")
    value = state.passes.to_bytes(8, "little")
    for page in range(state.at, min(state.at + PAGES_A_STEP, pages)):
        begin = page * PAGE
        if memory[begin : begin + 8] != expected:
            state.mistakes += 1
        memory[begin : begin + 8] = value
    state.at += PAGES_A_STEP
    if state.at >= pages:
        state.at = 0
        state.passes += 1


def main() -> None:
    """Write until the daemon says quit."""
    parser = argparse.ArgumentParser(description="a workload that dirties memory")
    parser.add_argument("socket")
    parser.add_argument("--mib", type=int, default=64, help="memory that is written")
    parser.add_argument("--rate-mb-s", type=float, default=200.0, help="memory a second; 0: all")
    parser.add_argument("--report", type=Path, help="file that always holds the state, as JSON")
    parser.add_argument("--huge", action="store_true", help="in huge pages that are set aside")
    options = parser.parse_args()
    pages = (options.mib << 20) // PAGE
    state = Dirtier()

    def reset() -> None:
        for page in range(pages):
            memory[page * PAGE : page * PAGE + 8] = bytes(8)
        state.passes, state.at, state.mistakes = 1, 0, 0

    workload = Workload("dirtier", on_reset=reset)
    memory = memoryview(workload.add_block("heap", pages * PAGE, huge=options.huge))
    workload.add_device(STATE, state)
    workload.attach(options.socket)
    step_s = PAGES_A_STEP * PAGE / (options.rate_mb_s * 1e6) if options.rate_mb_s else 0.0
    due = reported = time.monotonic()
    while True:
        with workload.active():
            step(state, memory, pages)
            now = time.monotonic()
            if options.report is not None and now - reported > 0.02:
                reported = now
                report(options.report, state, now)
        due = max(due + step_s, now - 0.01)
        if due > now:
            time.sleep(due - now)


def report(path: Path, state: Dirtier, now: float) -> None:
    """Say where the writer is; a reader never sees half of it."""
    text = json.dumps(
        {"passes": state.passes, "at": state.at, "mistakes": state.mistakes, "t": now}
    )
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)


if __name__ == "__main__":
    main()

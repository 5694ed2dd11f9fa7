"""The guest of a replayed script: ``python -m tests.conformance.replay_guest SOCKET MIB [busy]``.

It is like the recorder's: memory that is mostly zero, a firmware's worth of contents, and
where the script brings a firmware that never rests, the same 128 pages written in a loop.
"""

import random
import sys
import time

from migrationd.workload import VMState, Workload, u64

PAGE = 4096
ROM_KIB = 384
BUSY_PAGES = 128
FIRST_BUSY_PAGE = 16
REST_S = 0.02
"""Between two rounds: the recorded migrations ended before the scripts' first look."""


class State:
    """What the guest counts."""

    def __init__(self) -> None:
        self.rounds = 0


def main() -> None:
    """Run until the daemon says quit."""
    path, mib = sys.argv[1], int(sys.argv[2])
    is_busy = sys.argv[3:] == ["busy"]
    state = State()

    def reset() -> None:
        state.rounds = 0

    workload = Workload("replayed", on_reset=reset)
    ram = workload.add_block("ram", mib << 20)
    rom = workload.add_block("rom", ROM_KIB << 10)
    rom[:] = random.Random(1).randbytes(len(rom))
    workload.add_device(VMState("rounds", fields=(u64("rounds"),)), state)
    workload.attach(path, timeout_s=60)  # both start at once, on a machine that may be busy
    while True:
        with workload.active():
            state.rounds += 1
            if is_busy:
                for page in range(FIRST_BUSY_PAGE, FIRST_BUSY_PAGE + BUSY_PAGES):
                    at = page * PAGE
                    ram[at] = (ram[at] + 1) & 0xFF
        time.sleep(REST_S if is_busy else 0.05)


if __name__ == "__main__":
    main()

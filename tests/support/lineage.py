"""A workload whose every step is on record, whoever makes it.

    python lineage.py SOCKET LOG NAME

A step writes its number to memory and then to a file that all copies append to. Memory
and number travel: a guest that ever ran twice from the same state leaves a number twice.
"""

import os
import sys
import time
from types import SimpleNamespace

from migrationd.workload import VMState, Workload, u32, u64

PAGES = 512
PAGE = 4096


def main() -> None:
    """Step until the daemon says quit."""
    socket, log, name = sys.argv[1:]
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    state = SimpleNamespace(lineage=os.getpid(), step=0, mistakes=0)
    workload = Workload("lineage")
    memory = workload.add_block("heap", PAGES * PAGE)
    fields = (u64("lineage"), u64("step"), u32("mistakes"))
    workload.add_device(VMState("lineage", fields=fields), state)
    workload.attach(socket, timeout_s=60)
    while True:
        with workload.active():
            state.step += 1
            at = state.step % PAGES * PAGE
            before = int.from_bytes(memory[at : at + 8], "little")
            state.mistakes += before != max(0, state.step - PAGES)
            memory[at : at + 8] = state.step.to_bytes(8, "little")
            os.write(fd, f"{state.lineage} {state.step} {state.mistakes} {name}\n".encode())
        time.sleep(0.002)


if __name__ == "__main__":
    main()

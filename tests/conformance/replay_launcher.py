"""Starts migrationd from a QEMU command line: ``python -m tests.conformance.replay_launcher``.

The recorder starts its programs as a QEMU and expects a guest in them. Here it is a live
workload (``replay_guest``) of the size that ``-m`` says, which writes all the time where the
script brings a firmware that does so; with ``--guest parked`` one that a real QEMU of the same
options has just handed over; with ``--guest recorded`` one out of a recorded file. The monitors
appear under the recorder's paths once the guest is there. The daemon keeps the process number,
so that what kills "the QEMU" kills it.
"""

import argparse
import ctypes
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "conformance" / "captures" / "111-mapped-ram-pc.bin.gz"
WAIT_S = 20.0

VALUED = ("machine", "accel", "display", "m", "bios", "drive", "device", "global", "boot")
"""Options of the machine, which has no counterpart here; each takes a value."""

PASSED = ("incoming", "name", "uuid", "object")
"""Options that migrationd has too."""

_PR_SET_PDEATHSIG = 1


@dataclass
class Wanted:
    """What a QEMU command line asks for.

    Attributes:
        machine: Arguments that shape the guest, for a real QEMU.
        passed: Arguments for migrationd.
        monitors: Paths of the monitors.
        memory_mib: ``-m``.
        is_busy: Whether the firmware writes all the time.
        is_incoming: Whether it waits for a guest.
    """

    machine: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    monitors: list[str] = field(default_factory=list)
    memory_mib: int = 16
    is_busy: bool = False
    is_incoming: bool = False


def parse(arguments: Sequence[str]) -> Wanted:
    """Sort a QEMU command line."""
    wanted = Wanted()
    rest = list(arguments)
    while rest:
        name = rest.pop(0).removeprefix("-")
        if name == "qmp":
            wanted.monitors.append(rest.pop(0).removeprefix("unix:").split(",")[0])
        elif name in PASSED:
            wanted.is_incoming |= name == "incoming"
            wanted.passed += [f"-{name}", rest.pop(0)]
        elif name in VALUED:
            value = rest.pop(0)
            wanted.machine += [f"-{name}", value]
            if name == "m":
                wanted.memory_mib = int(value)
            wanted.is_busy |= name == "bios"
        elif name == "nodefaults":
            wanted.machine.append("-nodefaults")
        else:
            wanted.passed.append(f"-{name}")
    return wanted


def hidden(path: str) -> str:
    """Where a monitor is until the guest is there."""
    return f"{path}.early"


def ask(path: str, *names: str) -> object:
    """Run commands on a monitor; the last one's value."""
    deadline = time.monotonic() + WAIT_S
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        while True:
            try:
                sock.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        lines = sock.makefile("rw")
        lines.readline()
        answer: dict[str, object] = {}
        for name in ("qmp_capabilities", *names):
            lines.write(json.dumps({"execute": name}) + "\n")
            lines.flush()
            while "return" not in (answer := json.loads(lines.readline())):
                if "error" in answer:
                    raise RuntimeError(f"{name}: {answer['error']}")
        return answer["return"]


def die_with_parent() -> None:
    """End when the daemon ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def attend(wanted: Wanted, guest_socket: str | None) -> None:
    """Attach the workload, wait until it is there, and show the monitors."""
    first = hidden(wanted.monitors[0])
    if guest_socket is not None:
        subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.replay_guest", guest_socket,
             str(wanted.memory_mib), *(["busy"] if wanted.is_busy else [])],
            cwd=ROOT,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        memory = ask(first, "query-memory-size-summary")
        assert isinstance(memory, dict)
        if guest_socket is None or wanted.is_incoming or memory["base-memory"]:
            break
        time.sleep(0.02)
    for path in wanted.monitors:
        while not os.path.exists(hidden(path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.rename(hidden(path), path)
    signal.pause()


def park(wanted: Wanted, qemu: str, directory: Path) -> None:
    """Let a real QEMU hand its guest over, to rest in the directory."""
    monitor, door, source = (str(directory / name) for name in ("p.qmp", "p.sock", "q.qmp"))
    daemon = subprocess.Popen(
        [sys.executable, "-m", "migrationd", "-name", "guest", "-ram-dir", str(directory),
         "-incoming", f"unix:{door}", "-qmp", f"unix:{monitor},server=on,wait=off"],
        cwd=ROOT,
    )  # fmt: skip
    emulator = subprocess.Popen(
        [qemu, *wanted.machine, "-qmp", f"unix:{source},server=on,wait=off"]
    )
    try:
        ask(monitor, "query-status")
        with socket.socket(socket.AF_UNIX) as sock:
            deadline = time.monotonic() + WAIT_S
            while sock.connect_ex(source) != 0:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            lines = sock.makefile("rw")
            for name, arguments in (
                ("qmp_capabilities", {}),
                ("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000}),
                ("migrate", {"uri": f"unix:{door}"}),
            ):
                lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                lines.flush()
            while True:
                state = ask(monitor, "query-migrate")
                assert isinstance(state, dict)
                if state.get("status") == "completed":
                    break
                assert state.get("status") != "failed", state
                time.sleep(0.05)
    finally:
        emulator.kill()
        emulator.wait()
    ask(monitor, "quit")
    daemon.wait(WAIT_S)


def main() -> None:
    """Become migrationd."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--guest", choices=("none", "attached", "parked", "recorded"), default="attached"
    )
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="where a parked one is from")
    own, rest = parser.parse_known_args()
    wanted = parse(rest)
    directory = Path(wanted.monitors[0]).parent
    side = Path(wanted.monitors[0]).name.split("-")[0]
    arguments = list(wanted.passed)
    guest_socket = None
    if own.guest == "attached":
        guest_socket = str(directory / f"{side}.guest")
        arguments += ["-guest", f"attach:{guest_socket}"]
    elif own.guest in ("parked", "recorded") and not wanted.is_incoming:
        rest_at = directory / f"{side}.ram"
        rest_at.mkdir()
        if own.guest == "parked":
            park(wanted, own.qemu, rest_at)
        else:
            (rest_at / "guest.mapped-ram").write_bytes(gzip.decompress(RECORDED.read_bytes()))
        arguments += ["-name", "guest", "-ram-dir", str(rest_at)]
    for path in wanted.monitors:
        arguments += ["-qmp", f"unix:{hidden(path)},server=on,wait=off"]
    parent = os.getpid()
    if os.fork() == 0:
        die_with_parent()
        if os.getppid() == parent:
            attend(wanted, guest_socket)
        os._exit(0)
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "migrationd", *arguments])


if __name__ == "__main__":
    main()

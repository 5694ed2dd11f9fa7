"""The monitor beside a real QEMU's: round trips, latency, CPU time, one client and fifty.

    python -m benchmarks.monitor [--reps N] [--seconds S] [--qemu BINARY]

Each client has a monitor of its own, as QEMU serves one client per monitor, and sends
its next command when it has the reply. QEMU and migrationd take turns; what counts are
the ratios within one run. Both have a completed migration behind them, so that
``query-migrate`` has all its members.
"""

import argparse
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import cpu_s, machine_cpu_s, median, percentile
from benchmarks.ratios import verdict, warn_if_busy
from migrationd.ctl.qemu_process import find_qemu, installed_versions, qemu_version

COMMANDS = ("query-status", "query-migrate")
CLIENTS = (1, 50)
P99_GOAL_S = 0.0005
SCHEMA_GOAL_S = 0.020
GREETING_GOAL_S = 0.005
NOISE = 0.05
NEGOTIATE = b'{"execute": "qmp_capabilities"}'


class Client:
    """A client of one monitor that does as little as possible beside waiting."""

    def __init__(self, path: Path) -> None:
        start = time.perf_counter()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.receive()
        self.greeting_s = time.perf_counter() - start
        self.ask(NEGOTIATE)

    def receive(self) -> bytes:
        """One reply; nothing else comes while nothing happens."""
        data = self.sock.recv(1 << 16)
        while not data.endswith(b"\n"):
            more = self.sock.recv(1 << 20)
            if not more:
                raise EOFError("the monitor closed the connection")
            data += more
        return data

    def ask(self, command: bytes) -> bytes:
        """A reply, without the events before it."""
        self.sock.sendall(command)
        lines = self.receive().splitlines()
        while b'"event"' in lines[-1][:80]:
            lines = self.receive().splitlines()
        return lines[-1]

    def query(self, name: str, **arguments: object) -> object:
        """What a command returns."""
        command = {"execute": name, "arguments": arguments}
        return json.loads(self.ask(json.dumps(command).encode()))["return"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One kind of load on one peer.

    Attributes:
        rate: Round trips in a second, of all clients together.
        p50_s: Half of them took at most this long.
        p99_s: All but a hundredth.
        cpu_s: User and system time of the peer for each.
        other_cpus: CPUs that everything but the peer and this program used meanwhile.
    """

    rate: float
    p50_s: float
    p99_s: float
    cpu_s: float
    other_cpus: float


@dataclass(frozen=True, slots=True)
class Peer:
    """A process with monitors.

    Attributes:
        pid: The process.
        clients: One for each monitor, negotiated.
    """

    pid: int
    clients: Sequence[Client]

    def sample(self, command: str, seconds: float) -> Sample:
        """Let all clients ask over and over."""
        request = b'{"execute": "' + command.encode() + b'"}'
        clients = self.clients
        before = (cpu_s(self.pid), time.process_time(), machine_cpu_s())
        start = time.perf_counter()
        if len(clients) == 1:
            taken = _alone(clients[0], request, seconds)
        else:
            taken = _many(clients, request, seconds)
        wall_s = time.perf_counter() - start
        peer_s = cpu_s(self.pid) - before[0]
        others_s = machine_cpu_s() - before[2] - peer_s - (time.process_time() - before[1])
        return Sample(
            len(taken) / wall_s,
            percentile(taken, 0.5),
            percentile(taken, 0.99),
            peer_s / len(taken),
            max(0.0, others_s / wall_s),
        )


def _alone(client: Client, request: bytes, seconds: float) -> list[float]:
    taken = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        start = now
        client.sock.send(request)
        client.receive()
        now = time.perf_counter()
        taken.append(now - start)
    return taken


def _many(clients: Sequence[Client], request: bytes, seconds: float) -> list[float]:
    taken = []
    with selectors.EpollSelector() as selector:
        started = {}
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
            started[client] = time.perf_counter()
            client.sock.send(request)
        end = time.perf_counter() + seconds
        while started:
            for key, _ in selector.select():
                client = key.data
                client.receive()
                now = time.perf_counter()
                taken.append(now - started.pop(client))
                if now < end:
                    started[client] = now
                    client.sock.send(request)
    return taken


@contextmanager
def process(command: Sequence[str], monitors: int) -> Iterator[Peer]:
    """Start a peer with so many monitors."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migrationd-")))
        paths = [directory / f"{number}.sock" for number in range(monitors)]
        words = list(command)
        for path in paths:
            words += ["-qmp", f"unix:{path},server=on,wait=off"]
        child = subprocess.Popen(words)
        stack.callback(child.wait)
        stack.callback(child.kill)
        while not paths[-1].exists():
            if child.poll() is not None:
                raise RuntimeError(f"{words[0]} ended")
            time.sleep(0.01)
        clients = [Client(path) for path in paths]
        for client in clients:
            stack.callback(client.sock.close)
        yield Peer(child.pid, clients)


def migrate(source: Client, uri: str) -> None:
    """Migrate and wait for the end of it."""
    source.query("migrate", uri=uri)
    while True:
        info = source.query("query-migrate")
        assert isinstance(info, dict)
        if info["status"] == "completed":
            return
        if info["status"] == "failed":
            raise RuntimeError(f"the migration failed: {info}")
        time.sleep(0.02)


def run(binary: str, seconds: float, reps: int) -> None:
    """Measure and print."""
    print(f"QEMU {qemu_version(binary)} and migrationd, {reps} turns of {seconds:g} s each; "
          "medians, and the ratio to QEMU of the same turn")  # fmt: skip
    print(f"{'':<39}{'round trips/s':>15}{'p50 ms':>9}{'p99 ms':>9}{'CPU us each':>13}"
          f"{'rate x':>8}")  # fmt: skip
    totals: dict[tuple[str, int], float] = {}
    others: list[float] = []
    for count in CLIENTS:
        with pair(binary, count) as peers:
            for command in COMMANDS:
                samples: dict[str, list[Sample]] = {name: [] for name in peers}
                for rep in range(reps):
                    turns = list(peers.items())
                    for name, peer in turns if rep % 2 == 0 else turns[::-1]:
                        samples[name].append(peer.sample(command, seconds))
                _print_samples(command, count, samples)
                totals[command, count] = median(s.rate for s in samples["migrationd"])
                others += [s.other_cpus for taken in samples.values() for s in taken]
            if count == 1:
                _print_small(**peers)
    for command in COMMANDS:
        few, many = (totals[command, count] for count in CLIENTS)
        print(f"{command}: total rate with {CLIENTS[1]} clients x {many / few:.2f} of that "
              f"with one{verdict(many >= (1 - NOISE) * few)}")  # fmt: skip
    warn_if_busy(others)


@contextmanager
def pair(binary: str, monitors: int) -> Iterator[dict[str, Peer]]:
    """A QEMU and a migrationd with so many monitors, each behind a completed migration."""
    qemu = [binary, "-machine", "pc", "-m", "64", "-nodefaults", "-display", "none",
            "-accel", "tcg"]  # fmt: skip
    ours = [sys.executable, "-m", "migrationd", "-incoming", "defer", "-log-level", "warning"]
    with process(qemu, monitors) as theirs, process(ours, monitors) as mine:
        with tempfile.TemporaryDirectory(prefix="migrationd-") as directory:
            uri = f"unix:{directory}/migration.sock"
            mine.clients[0].query("migrate-incoming", uri=uri)
            migrate(theirs.clients[0], uri)
            waiting = {"status": "inmigrate", "running": False}
            while mine.clients[0].query("query-status") == waiting:
                time.sleep(0.02)
            migrate(mine.clients[0], "exec:cat >/dev/null")
        for client in (*theirs.clients, *mine.clients):
            client.query("query-status")  # events of the migrations are out of the way then
        yield {"QEMU": theirs, "migrationd": mine}


def _print_samples(command: str, count: int, samples: dict[str, list[Sample]]) -> None:
    for name, taken in samples.items():
        label = f"{command}, {count} client{'s' if count > 1 else ''}"
        p99 = median(s.p99_s for s in taken)
        text = (
            f"{label if name == 'QEMU' else '':<27}{name:<12}"
            f"{median(s.rate for s in taken):>15,.0f}{median(s.p50_s for s in taken) * 1e3:>9.3f}"
            f"{p99 * 1e3:>9.3f}{median(s.cpu_s for s in taken) * 1e6:>13.1f}"
        )
        if name == "migrationd":
            pairs = zip(taken, samples["QEMU"], strict=True)
            ratio = median(own.rate / other.rate for own, other in pairs)
            is_met = ratio >= 1 and (count > 1 or p99 < P99_GOAL_S)
            text += f"{ratio:>8.2f}{verdict(is_met)}"
        print(text)


def _print_small(**peers: Peer) -> None:
    mine, theirs = peers["migrationd"], peers["QEMU"]
    for label, goal, measure in (
        ("query-qmp-schema", SCHEMA_GOAL_S, _schema_s),
        ("connect to greeting", GREETING_GOAL_S, lambda peer: peer.clients[0].greeting_s),
    ):
        own, other = measure(mine), measure(theirs)
        print(f"{label}: {own * 1e3:.2f} ms, QEMU's {other * 1e3:.2f} ms "
              f"(goal: < {goal * 1e3:.0f}){verdict(own < goal)}")  # fmt: skip


def _schema_s(peer: Peer) -> float:
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        peer.clients[0].ask(b'{"execute": "query-qmp-schema"}')
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    newest = installed_versions()[-1:]
    parser.add_argument("--qemu", default=find_qemu(newest[0]) if newest else None)
    options = parser.parse_args()
    if options.qemu is None:
        print("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
        return 1
    run(options.qemu, options.seconds, options.reps)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How live workloads converge: downtime, and what helps where the line is too thin.

    python -m benchmarks.convergence [downtime] [table] [idle] [--reps N] [--qemu BINARY]
    python -m benchmarks.convergence downtime --within 90 --into FILE    # again and again

``downtime``: 1 GiB over tcp, default ``downtime-limit``, at two rates of writing, beside QEMU
with a guest that writes as fast. ``table``: over a line of 1 Gbit/s, each way of converging at
several rates. ``idle``: 4 GiB that nobody writes. Downtime is from the STOP of the source to the
RESUME of the destination; "silent" is what the workload itself measured. With ``--within`` and
``--into`` the runs are made in pieces: each begins none after so many seconds, adds what it
measured to a file of JSON lines, and shows what all of them measured.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import cpu_s, percentile, warm_memory, warm_shared_memory
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version

MIB = 1 << 20
RANGE_MIB = 256
LIMIT_MS = 300
DOWNTIME_GOAL_MS = 60
IDLE_GOAL_MS = 30
THIN_LINE_BYTES_PER_S = 125_000_000
GIVE_UP_S = 15.0
WIDE_GIVE_UP_S = 60.0
TABLE_RATES = (40, 188, 400, 800)
WAYS: dict[str, dict[str, bool]] = {
    "plain": {},
    "auto-converge": {"auto-converge": True},
    "xbzrle": {"xbzrle": True},
    "multifd": {"multifd": True},
    "postcopy": {"postcopy-ram": True},
}
XBZRLE_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """One migration.

    Attributes:
        total_s: From ``migrate`` to completed; None if it was given up.
        down_ms: From STOP to RESUME.
        silent_ms: What the workload measured; None of a QEMU.
        passes: ``dirty-sync-count``.
        sent_bytes: On the wire.
        why: First reason in ``query-migrate`` why it does not converge.
        why_after_s: When that came.
        source_cpu_s: User and system time of the source.
        throttle: Last ``cpu-throttle-percentage``.
    """

    total_s: float | None
    down_ms: float | None
    silent_ms: float | None
    passes: int
    sent_bytes: int
    why: str | None
    why_after_s: float | None
    source_cpu_s: float
    throttle: int


def stamp_ms(event: Mapping[str, object]) -> float:
    """When an event was sent."""
    stamp = event["timestamp"]
    assert isinstance(stamp, dict)
    return float(stamp["seconds"]) * 1e3 + float(stamp["microseconds"]) / 1e3


async def measured(
    source: PeerProcess,
    destination: PeerProcess,
    uri: str,
    report: Path | None,
    *,
    starts_postcopy: bool = False,
) -> Result:
    """Migrate until it is complete, or too long; to postcopy after the first pass, if told."""
    why, why_after_s, throttle = None, None, 0
    begin, cpu_begin = time.monotonic(), cpu_s(source.pid)
    await source.execute("migrate", {"uri": uri})
    while True:
        info = await source.query_migrate()
        elapsed_s = time.monotonic() - begin
        if why is None and info["status"] == "active" and "error-desc" in info:
            why, why_after_s = str(info["error-desc"]), elapsed_s
        ram_now = info.get("ram")
        if starts_postcopy and isinstance(ram_now, dict) and ram_now["dirty-sync-count"] > 1:
            starts_postcopy = False
            await source.execute("migrate-start-postcopy")
        if isinstance(percentage := info.get("cpu-throttle-percentage"), int):
            throttle = percentage
        if info["status"] in ("completed", "failed"):
            break
        is_thin = (await source.query("query-migrate-parameters"))["max-bandwidth"] != 0
        if elapsed_s > (GIVE_UP_S * (3 if throttle else 1) if is_thin else WIDE_GIVE_UP_S):
            ram = info["ram"]
            assert isinstance(ram, dict)
            await source.execute("migrate_cancel")
            await source.wait_migration("cancelled")
            return Result(None, None, None, ram["dirty-sync-count"], ram["transferred"],
                          why, why_after_s, cpu_s(source.pid) - cpu_begin, throttle)  # fmt: skip
        await asyncio.sleep(0.05)
    if info["status"] == "failed":
        raise SystemExit(f"the migration failed: {info}")
    ram = info["ram"]
    total = info["total-time"]
    assert isinstance(ram, dict)
    assert isinstance(total, int)
    stopped = await source.wait_event("STOP")
    resumed = await destination.wait_event("RESUME")
    silent_ms = None
    if report is not None:
        while not report.exists() or not (text := report.read_text()):
            await asyncio.sleep(0.01)
        silent_ms = float(text)
    return Result(total / 1000, stamp_ms(resumed) - stamp_ms(stopped), silent_ms,
                  ram["dirty-sync-count"], ram["transferred"], why, why_after_s,
                  cpu_s(source.pid) - cpu_begin, throttle)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """A guest of either kind.

    Attributes:
        mib: Memory.
        rate_mb_s: Memory that it writes a second, within :data:`RANGE_MIB`.
        fill: ``random``: all of it; ``range``: what is written; ``none``.
    """

    mib: int
    rate_mb_s: float
    fill: str = "random"


@functools.lru_cache
def warm_once(size_bytes: int) -> None:
    """What one run gives back is as good for the next."""
    warm_memory(size_bytes)


@contextlib.asynccontextmanager
async def writer(load: Load, path: Path, report: Path) -> AsyncIterator[None]:
    """A workload of ours."""
    command = [sys.executable, "-m", "benchmarks.writer", str(path), str(report)]
    command += ["--mib", str(load.mib), "--range-mib", str(min(RANGE_MIB, load.mib))]
    command += ["--rate-mb-s", str(load.rate_mb_s), "--fill", load.fill]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def workload_run(
    load: Load, capabilities: Mapping[str, bool], bandwidth: int, settle_s: float = 0.5
) -> Result:
    """A workload from one daemon to another."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="migrationd-bench-"))
        )
        here, there, report = (directory / name for name in ("here", "there", "report"))
        source = await stack.enter_async_context(
            await DaemonProcess.start(arguments=["-guest", f"attach:{here}"])
        )
        destination = await stack.enter_async_context(
            await DaemonProcess.start(incoming="defer", arguments=["-guest", f"attach:{there}"])
        )
        for peer in (source, destination):
            await peer.set_capabilities({"events": True, "return-path": True, **capabilities})
            await peer.set_parameters(
                {"max-bandwidth": bandwidth, "xbzrle-cache-size": XBZRLE_CACHE_BYTES}
            )
        await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        await stack.enter_async_context(writer(load, here, directory / "unused"))
        idle = Load(load.mib, load.rate_mb_s, "none")
        await stack.enter_async_context(writer(idle, there, report))
        await source.wait_run_state("running", timeout_s=60)
        await asyncio.sleep(settle_s)
        uri = await destination.listening_uri()
        warm_shared_memory((load.mib + RANGE_MIB) << 20)
        return await measured(source, destination, uri, report,
                              starts_postcopy="postcopy-ram" in capabilities)  # fmt: skip


async def qemu_run(
    binary: str, load: Load, capabilities: Mapping[str, bool], bandwidth: int
) -> Result:
    """A guest that writes as fast from one QEMU to another."""
    warm_once((2 * load.mib + 512) << 20)
    counted = RANGE_MIB * 256
    filled = (load.mib - RANGE_MIB - 64) * 256 if load.fill == "random" else 0
    guest = BootGuest(
        counted_pages=counted, filled_pages=filled, pages_per_s=int(load.rate_mb_s * 1e6 / 4096)
    )

    async def start(incoming: str | None) -> QemuProcess:
        size = f"{load.mib}M"
        return await QemuProcess.start(
            binary, machine="pc,memory-backend=ram0", memory_mib=load.mib, guest=guest,
            arguments=["-object", f"memory-backend-ram,id=ram0,size={size},prealloc=on"],
            incoming=incoming, timeout_s=60,
        )  # fmt: skip

    async with await start(None) as source, await start("defer") as destination:
        for peer in (source, destination):
            await peer.set_capabilities({"events": True, "return-path": True, **capabilities})
            await peer.set_parameters(
                {"max-bandwidth": bandwidth, "xbzrle-cache-size": XBZRLE_CACHE_BYTES}
            )
        await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        await source.wait_serial(2, timeout_s=120)
        uri = await destination.listening_uri()
        return await measured(source, destination, uri, None,
                              starts_postcopy="postcopy-ram" in capabilities)  # fmt: skip


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.0f} ({min(values):.0f}..{max(values):.0f})"


class Runs:
    """What was measured, by rate and pair, over as many pieces as it took.

    Args:
        within_s: No run begins later than this.
        path: File with a JSON object for each run; None to begin with nothing and keep nothing.
    """

    def __init__(self, within_s: float, path: Path | None) -> None:
        self._until_s = time.monotonic() + within_s
        self._path = path
        self._found: dict[tuple[int, str], list[Result]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                key = (int(fields.pop("rate")), str(fields.pop("pair")))
                self._found.setdefault(key, []).append(Result(**fields))

    @property
    def is_over(self) -> bool:
        """Whether no further run begins."""
        return time.monotonic() > self._until_s

    def add(self, rate: int, pair: str, result: Result) -> None:
        """Keep a run."""
        self.of(rate, pair).append(result)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"rate": rate, "pair": pair, **asdict(result)}) + "\n")

    def of(self, rate: int, pair: str) -> list[Result]:
        """All runs of a pair at a rate."""
        return self._found.setdefault((rate, pair), [])


async def downtime(
    binary: str | None, rates: list[int], reps: int, runs: Runs, every: int = 1
) -> None:
    """Default limit, no bandwidth limit; a QEMU beside every so many runs."""
    print(f"downtime, ms: 1 GiB of random bytes, {RANGE_MIB} MiB of it written, tcp, "
          f"downtime-limit {LIMIT_MS}; median (least..most)")  # fmt: skip
    head = f"{'MB/s':>5} {'pair':<12}{'STOP to RESUME':>18}{'silent':>18}{'over the limit':>16}"
    print(f"{head}{'runs':>6}{'passes':>8}{'total s':>9}{'MB sent':>9}{'CPU s':>7}")
    for rate in rates:
        load = Load(1024, rate)
        while len(runs.of(rate, "workload")) < reps and not runs.is_over:
            runs.add(rate, "workload", await workload_run(load, {}, 0))
            is_due = len(runs.of(rate, "workload")) > every * len(runs.of(rate, "QEMU"))
            if binary is not None and is_due and not runs.is_over:
                runs.add(rate, "QEMU", await qemu_run(binary, load, {}, 0))
        for name in ("workload", "QEMU"):
            if taken := runs.of(rate, name):
                print(_downtime_line(rate, name, taken), flush=True)


def _downtime_line(rate: int, name: str, taken: list[Result]) -> str:
    """A line of the table of :func:`downtime`."""
    down = [item.down_ms for item in taken if item.down_ms is not None]
    silent = [item.silent_ms for item in taken if item.silent_ms is not None]
    if not down:
        return f"{rate:>5} {name:<12}  given up in all {len(taken)} runs"
    over = sum(value > LIMIT_MS for value in silent or down)
    goal = ""
    if name == "workload":
        is_met = not over and median(down) <= DOWNTIME_GOAL_MS and len(down) == len(taken)
        goal = "  ok" if is_met else f"  -- (goal: median {DOWNTIME_GOAL_MS}, none over)"
    return (f"{rate:>5} {name:<12}{spread(down):>18}{spread(silent) if silent else '':>18}"
            f"{over:>16}{len(taken):>6}{median(item.passes for item in taken):>8.0f}"
            f"{median(item.total_s or 0 for item in taken):>9.2f}"
            f"{median(item.sent_bytes for item in taken) / 1e6:>9.0f}"
            f"{median(item.source_cpu_s for item in taken):>7.2f}{goal}")  # fmt: skip


async def table(binary: str | None, rates: list[int], ways: list[str]) -> None:
    """Each way at each rate over a thin line; the rest of the memory was never touched."""
    line = f"{THIN_LINE_BYTES_PER_S * 8 // 10**6} Mbit/s"
    print(f"\nconvergence over {line}: 1 GiB, {RANGE_MIB} MiB of it random and written, "
          f"downtime-limit {LIMIT_MS}, given up after {GIVE_UP_S:.0f} s")  # fmt: skip
    print(f"{'MB/s':>5} {'way':<15}{'pair':<10}{'total s':>9}{'down ms':>9}{'silent':>8}"
          f"{'passes':>8}{'MB sent':>9}{'CPU s':>7}{'slowed':>8}  why not, and when")  # fmt: skip
    for rate in rates:
        for way in ways:
            load = Load(1024, rate, "range")
            capabilities = WAYS[way]
            results = {"workload": await workload_run(load, capabilities, THIN_LINE_BYTES_PER_S)}
            if binary is not None:
                results["QEMU"] = await qemu_run(binary, load, capabilities, THIN_LINE_BYTES_PER_S)
            for name, item in results.items():
                total = f"{item.total_s:.2f}" if item.total_s is not None else "never"
                down = f"{item.down_ms:.0f}" if item.down_ms is not None else ""
                silent = f"{item.silent_ms:.0f}" if item.silent_ms is not None else ""
                slowed = f"{item.throttle} %" if item.throttle else ""
                why = f"  {item.why_after_s:.1f} s: {item.why}" if item.why else ""
                print(f"{rate:>5} {way:<15}{name:<10}{total:>9}{down:>9}{silent:>8}"
                      f"{item.passes:>8}{item.sent_bytes / 1e6:>9.0f}{item.source_cpu_s:>7.2f}"
                      f"{slowed:>8}{why}", flush=True)  # fmt: skip


async def idle(reps: int) -> None:
    """A workload that nobody writes to."""
    taken = [await workload_run(Load(4096, 0, "random"), {}, 0) for _ in range(reps)]
    down = [item.down_ms for item in taken if item.down_ms is not None]
    silent = [item.silent_ms for item in taken if item.silent_ms is not None]
    if not silent:
        print(f"\n4 GiB idle: given up in all {reps} runs")
        return
    verdict = "ok" if max(silent) < IDLE_GOAL_MS else "--"
    print(f"\n4 GiB idle, ms: STOP to RESUME {spread(down)}, silent {spread(silent)}, "
          f"p90 {percentile(silent, 0.9):.0f} {verdict} (goal: < {IDLE_GOAL_MS})")  # fmt: skip


async def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    binary = None if options.alone else options.qemu or find_qemu()
    beside = f"QEMU {qemu_version(binary)} (TCG)" if binary else "no QEMU"
    print(f"live workloads, beside {beside}")
    parts = options.parts or ["downtime", "table", "idle"]
    if "downtime" in parts:
        chosen = [int(text) for text in options.downtime_rates.split(",")]
        runs = Runs(options.within, options.into)
        await downtime(binary, chosen, options.reps, runs, options.every)
    if "table" in parts:
        rates = [int(text) for text in options.rates.split(",")]
        await table(binary, rates, options.ways.split(","))
    if "idle" in parts:
        await idle(min(options.reps, 5))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["downtime", "table", "idle", []])
    parser.add_argument("--downtime-rates", default="204,819", help="MB/s")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--rates", default=",".join(map(str, TABLE_RATES)), help="MB/s")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--within", type=float, default=3600.0, help="s; of downtime")
    parser.add_argument("--into", type=Path, default=None, help="file of the runs of downtime")
    parser.add_argument("--every", type=int, default=1, help="runs of downtime for one of QEMU")
    parser.add_argument("--qemu", default=None)
    parser.add_argument("--alone", action="store_true", help="without QEMU beside")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

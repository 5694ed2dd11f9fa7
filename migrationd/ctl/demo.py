"""``migrationctl demo``: a running guest goes QEMU → migrationd → QEMU, nothing lost.

The guest (see ``boot_guest``) counts in memory and prints a letter per pass; it is never
told that it moves. The proof at the end looks at its letters, its counters and the
random bytes it was filled with.
"""

import asyncio
import contextlib
import hashlib
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from migrationd.ctl.boot_guest import PAGE_BYTES, READY, BootGuest, check_run
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError, PeerProcess
from migrationd.ctl.progress import Progress, duration_text, rate_text, size_text
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version
from migrationd.ctl.watch import follow, make_display
from migrationd.errors import GuestError

_COUNTED_PAGES = 4096
_PAGES_PER_S = 40_000
_LETTERS_BEFORE = 12
_LETTERS_AFTER = 12
_HASH_STEP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What the demo is to do.

    Attributes:
        machine: Machine type of both QEMUs.
        binary: QEMU to use, or None for the one on the path.
        bandwidth_bytes_per_s: Limit of both moves, 0 for none.
        fill_bytes: Random bytes in the guest.
    """

    machine: str = "pc"
    binary: str | None = None
    bandwidth_bytes_per_s: int = 96 << 20
    fill_bytes: int = 192 << 20

    @property
    def guest(self) -> BootGuest:
        """The guest."""
        return BootGuest(
            counted_pages=_COUNTED_PAGES,
            pages_per_s=_PAGES_PER_S,
            filled_pages=self.fill_bytes // PAGE_BYTES,
        )

    @property
    def memory_mib(self) -> int:
        """RAM of the guest: what it uses, and as much again that stays zero."""
        return 128 * max(1, -(-2 * self.guest.needed_bytes // (128 << 20)))


async def run_demo(plan: DemoPlan, console: Console) -> None:
    """Run the demo and print what happens.

    Raises:
        PeerError: Something could not be started, or a migration failed.
        GuestError: The guest has lost something.
    """
    with cancelled_by_sigterm():
        async with contextlib.AsyncExitStack() as stack:
            await _Demo(plan, console, stack).run()


@contextlib.contextmanager
def cancelled_by_sigterm() -> Iterator[None]:
    """SIGTERM cancels the current task: what it started is ended too."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


class _Demo:
    def __init__(self, plan: DemoPlan, console: Console, stack: contextlib.AsyncExitStack) -> None:
        self.plan = plan
        self.guest = plan.guest
        self.console = console
        self.stack = stack

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    async def run(self) -> None:
        source = await self._start_source()
        daemon = await self.stack.enter_async_context(
            await DaemonProcess.start(incoming="tcp:127.0.0.1:0", arguments=["-name", "demo"])
        )
        idle_bytes = daemon.resident_bytes
        uri = await daemon.listening_uri()
        self.say(
            f"[bold]2[/] migrationd, process {daemon.pid}, waits on {uri} "
            f"({size_text(idle_bytes)} resident)"
        )
        inward = await self._move(source, daemon, uri, "in ")
        letters = source.serial
        filled_hash = await self._hash_filled(source)
        await source.close()
        await self._say_parked(daemon)

        destination = await self._start_destination()
        outward = await self._move(
            daemon, destination, await destination.listening_uri(), "out", letters
        )
        await destination.wait_run_state("running")
        await destination.wait_serial(_LETTERS_AFTER)
        await destination.execute("stop")
        run = check_run(
            letters + destination.serial,
            await destination.pmemsave(self.guest.counted_address, self.guest.counted_bytes),
        )
        if await self._hash_filled(destination) != filled_hash:
            raise GuestError("the guest's random bytes are not those it left with")
        self.say(
            f"[bold]5[/] the guest runs in QEMU B, process {destination.pid}, and counted on:\n"
            f"    QEMU A  {_tail(letters)}\n"
            f"    QEMU B  {' ' * len(_tail(letters))}{destination.serial[:40]}"
        )
        self._print_table(source, destination, inward, outward)
        self.say(
            f"[bold green]Nothing lost:[/] {run.passes} passes, a letter for each, "
            f"{self.guest.counted_pages} counters consistent,\n"
            f"{size_text(self.plan.fill_bytes)} of random bytes identical "
            f"(SHA-256 {filled_hash[:16]}…)."
        )

    async def _start_source(self) -> QemuProcess:
        binary = self.plan.binary or find_qemu()
        source = await self.stack.enter_async_context(
            await QemuProcess.start(
                binary,
                machine=self.plan.machine,
                memory_mib=self.plan.memory_mib,
                guest=self.guest,
                name="QEMU A",
            )
        )
        await source.wait_serial(len(READY) + _LETTERS_BEFORE)
        version = qemu_version(binary) if binary else ""
        self.say(
            f"[bold]1[/] QEMU A ({version}, {self.plan.machine}, {self.plan.memory_mib} MiB), "
            f"process {source.pid}, runs a guest that dirties "
            f"{rate_text(_PAGES_PER_S * PAGE_BYTES)}\n"
            f"    and prints a letter per pass: {_tail(source.serial)}"
        )
        return source

    async def _start_destination(self) -> QemuProcess:
        destination = await QemuProcess.start(
            self.plan.binary,
            machine=self.plan.machine,
            memory_mib=self.plan.memory_mib,
            guest=self.guest,
            incoming="tcp:127.0.0.1:0",
            name="QEMU B",
        )
        await self.stack.enter_async_context(destination)
        await destination.set_capabilities({"events": True})
        return destination

    async def _move(
        self, source: PeerProcess, target: PeerProcess, uri: str, label: str, before: str = ""
    ) -> Progress:
        await source.set_capabilities({"events": True, "return-path": True})
        await source.set_parameters({"max-bandwidth": self.plan.bandwidth_bytes_per_s})
        await source.execute("migrate", {"uri": uri})

        def note() -> str:
            shown = source if isinstance(source, QemuProcess) else target
            serial = shown.serial if isinstance(shown, QemuProcess) else ""
            return f"guest: {_tail(before + serial, 12)}"

        with make_display(self.console, label) as display:
            progress = await follow(source.query_migrate, display, note=note)
        if progress.status != "completed":
            raise PeerError(
                f"{source.name} → {target.name} ended as '{progress.status}': "
                f"{progress.error or 'no reason given'} {target.stderr.strip()}"
            )
        return progress

    async def _say_parked(self, daemon: DaemonProcess) -> None:
        state = await daemon.run_state()
        self.say(
            f"[bold]3[/] QEMU A is gone. The guest is parked in migrationd: run state '{state}', "
            f"{size_text(daemon.resident_bytes)} resident\n"
            f"    for {self.plan.memory_mib} MiB of guest RAM (zero pages cost nothing)\n"
            "[bold]4[/] QEMU B starts, with QEMU A's command line, and takes it:"
        )

    async def _hash_filled(self, qemu: QemuProcess) -> str:
        digest = hashlib.sha256()
        end = self.guest.filled_address + self.plan.fill_bytes
        for address in range(self.guest.filled_address, end, _HASH_STEP_BYTES):
            size = min(_HASH_STEP_BYTES, end - address)
            digest.update(await qemu.pmemsave(address, size))
        return digest.hexdigest()

    def _print_table(
        self, source: QemuProcess, destination: QemuProcess, inward: Progress, outward: Progress
    ) -> None:
        table = Table("", "guest RAM", "sent", "time", "rate", "downtime", title="\nWhat it took")
        for column in table.columns[1:]:
            column.justify = "right"
        for label, progress in (
            ("A → migrationd", inward),
            ("migrationd → B", outward),
        ):
            downtime = "" if progress.downtime_ms is None else f"{progress.downtime_ms} ms"
            table.add_row(
                label,
                size_text(progress.total_bytes),
                size_text(progress.transferred_bytes),
                duration_text(progress.total_time_ms / 1000),
                rate_text(progress.rate_bytes_per_s),
                downtime,
            )
        self.console.print(table)
        stopped_s = _event_time_s(source, "STOP")
        resumed_s = _event_time_s(destination, "RESUME")
        if stopped_s is not None and resumed_s is not None:
            self.say(
                f"From A's STOP to B's RESUME, with the time parked: "
                f"{duration_text(resumed_s - stopped_s)}."
            )


def _event_time_s(peer: PeerProcess, name: str) -> float | None:
    for event in peer.events:
        stamp = event.get("timestamp")
        if event["event"] == name and isinstance(stamp, Mapping):
            return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
    return None


def _tail(letters: str, count: int = 24) -> str:
    return letters if len(letters) <= count else "…" + letters[-count:]

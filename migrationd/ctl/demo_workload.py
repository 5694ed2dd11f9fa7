"""``migrationctl demo`` where there is no QEMU: a live process goes from daemon to daemon.

The workload (``examples/dirtier.py``) writes its memory all the time, checks every page
before it writes it, and is never told that it moves.
"""

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError
from migrationd.ctl.progress import Progress, duration_text, rate_text, size_text
from migrationd.ctl.watch import follow, make_display
from migrationd.errors import GuestError

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "dirtier.py"
_MIB = 128
_RATE_MB_S = 40
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _State:
    """What the workload last said of itself."""

    passes: int
    at: int
    mistakes: int
    t: float

    @property
    def place(self) -> tuple[int, int]:
        return self.passes, self.at


class _Workload:
    """A dirtier and its daemon."""

    def __init__(self, daemon: DaemonProcess, report: Path) -> None:
        self.daemon = daemon
        self._report = report

    def state(self) -> _State | None:
        try:
            return _State(**json.loads(self._report.read_text()))
        except FileNotFoundError:
            return None

    async def wait_beyond(self, place: tuple[int, int]) -> _State:
        """Wait until it is beyond a place."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _WAIT_S
        while (state := self.state()) is None or state.place <= place:
            if loop.time() > deadline:
                raise GuestError("the workload does not go on")
            await asyncio.sleep(0.02)
        return state


async def run_workload_demo(console: Console, bandwidth_bytes_per_s: int) -> None:
    """Run the demo and print what happens.

    Raises:
        PeerError: Something could not be started, or the migration failed.
        GuestError: The workload has lost something.
    """
    if not PROGRAM.exists():
        raise PeerError(f"'{PROGRAM}' is not there: run the demo from a checkout")

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    async with contextlib.AsyncExitStack() as stack:
        here = await _start(stack, incoming=None)
        there = await _start(stack, incoming="tcp:127.0.0.1:0")
        before = await here.wait_beyond((2, 0))
        say(
            f"[bold]1[/] a process with {_MIB} MiB of memory writes {_RATE_MB_S} MB/s and checks "
            f"every page: pass {before.passes}"
        )
        uri = await there.daemon.listening_uri()
        say(f"[bold]2[/] it moves, while it runs, to a fresh process behind {uri}")
        source = here.daemon
        await source.set_capabilities({"events": True, "return-path": True})
        await source.set_parameters({"max-bandwidth": bandwidth_bytes_per_s})
        await source.execute("migrate", {"uri": uri})
        with make_display(console, "move") as display:
            progress = await follow(source.query_migrate, display)
        if progress.status != "completed":
            raise PeerError(f"it ended as '{progress.status}': {progress.error or 'no reason'}")
        last = here.state()
        assert last is not None
        after = await there.wait_beyond((last.passes + 2, last.at))
        if after.mistakes:
            raise GuestError(f"{after.mistakes} pages do not hold what was written to them")
        if here.state() != last:
            raise GuestError("the source still runs")
        say(
            f"[bold]3[/] it stopped there in pass {last.passes} at page {last.at} "
            f"and goes on here: pass {after.passes}"
        )
        _print_table(console, progress)
        say(
            f"[bold green]Nothing lost:[/] two more passes over {size_text(_MIB << 20)}, every "
            "page held what was last written to it."
        )


async def _start(stack: contextlib.AsyncExitStack, *, incoming: str | None) -> _Workload:
    directory = DaemonProcess.make_directory()
    path, report = directory / "guest.sock", directory / "state.json"
    daemon = await stack.enter_async_context(
        await DaemonProcess.start(incoming=incoming, arguments=["-guest", f"attach:{path}"])
    )
    arguments = ["--mib", str(_MIB), "--rate-mb-s", str(_RATE_MB_S), "--report", str(report)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), str(path), *arguments
    )

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for left in (report, path):
            left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()

    stack.push_async_callback(end)
    if incoming is None:
        await daemon.wait_run_state("running")
    return _Workload(daemon, report)


def _print_table(console: Console, progress: Progress) -> None:
    table = Table("memory", "sent", "time", "rate", "downtime", title="\nWhat it took")
    for column in table.columns:
        column.justify = "right"
    table.add_row(
        size_text(progress.total_bytes),
        size_text(progress.transferred_bytes),
        duration_text(progress.total_time_ms / 1000),
        rate_text(progress.rate_bytes_per_s),
        "" if progress.downtime_ms is None else f"{progress.downtime_ms} ms",
    )
    console.print(table)

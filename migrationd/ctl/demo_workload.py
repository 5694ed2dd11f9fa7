"""``migrationctl demo`` where there is no QEMU: a live process goes from daemon to daemon.

The workload (``examples/dirtier.py``) writes its memory all the time, checks every page
before it writes it, and is never told that it moves.
"""

import contextlib
import shutil
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.demo import cancelled_by_sigterm
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess
from migrationd.ctl.peer_process import PeerError
from migrationd.ctl.progress import Progress, duration_text, rate_text, size_text
from migrationd.ctl.watch import follow, make_display
from migrationd.errors import GuestError

_MIB = 128
_RATE_MB_S = 40


@dataclass(frozen=True, slots=True)
class _End:
    """A workload and its daemon."""

    daemon: DaemonProcess
    work: DirtierProcess


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
        stack.enter_context(cancelled_by_sigterm())
        here = await _start(stack, incoming=None)
        there = await _start(stack, incoming="tcp:127.0.0.1:0")
        before = await here.work.wait_passes(1)
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
        last = here.work.progress()
        assert last is not None
        after = await there.work.wait_passes(2)
        if here.work.progress() != last:
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


async def _start(stack: contextlib.AsyncExitStack, *, incoming: str | None) -> _End:
    directory = DaemonProcess.make_directory()
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    work = DirtierProcess(directory, "demo", mib=_MIB, rate_mb_s=_RATE_MB_S)
    daemon = await stack.enter_async_context(
        await DaemonProcess.start(incoming=incoming, arguments=work.daemon_arguments)
    )
    await stack.enter_async_context(work)
    if incoming is None:
        await daemon.wait_run_state("running")
    return _End(daemon, work)


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

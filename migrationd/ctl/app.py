"""``migrationctl``: see, start, stop and follow migrations from a terminal; work on files.

All but ``demo`` and the commands on files speak QMP to ``--socket`` and work with migrationd
and with QEMU alike.
Exit status: 0 when done, 1 when it failed, 2 for a usage error, 130 after Ctrl-C; a demo ends with
143 after SIGTERM.
"""

import asyncio
import io
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from migrationd import __version__
from migrationd.ctl import file_commands, postcopy_commands
from migrationd.ctl.client import ClientError, Monitor, connected, parse_size
from migrationd.ctl.printable import say_error
from migrationd.ctl.progress import Progress
from migrationd.ctl.status import read_status, show_status
from migrationd.ctl.watch import follow, make_display
from migrationd.errors import MigrationdError
from migrationd.transport.address import (
    InetAddress,
    UnixAddress,
    parse_uri,
    socket_address_to_qapi,
)

app = typer.Typer(
    name="migrationctl",
    help="See, start, stop and follow migrations of migrationd and QEMU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
file_commands.register(app)
postcopy_commands.register(app, console)

_CANCEL_TIMEOUT_S = 30.0

T = TypeVar("T")
Info = dict[str, object]


def main() -> None:
    """Run the command line; errors are one line on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal's encoding has an arrow.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except MigrationdError as error:
        _fail(str(error))
    except OSError as error:
        # Standard output, above all: what else can fail has an error of its own.
        _fail(os.strerror(error.errno) if error.errno else str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:
        # A demo has ended what it started.
        sys.exit(128 + signal.SIGTERM)


def _fail(text: str) -> NoReturn:
    say_error(text)
    sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"migrationctl {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    socket: Annotated[
        str | None,
        typer.Option(
            "--socket",
            "-s",
            metavar="SOCKET",
            envvar="MIGRATIONCTL_SOCKET",
            help="QMP monitor: path of a UNIX socket, or HOST:PORT",
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Options before the command."""
    context.obj = socket


def _with_monitor(
    context: typer.Context, action: Callable[[Monitor], Coroutine[object, object, T]]
) -> T:
    address = context.obj
    if not isinstance(address, str) or not address:
        raise typer.BadParameter("say which monitor with -s SOCKET", param_hint="--socket")

    async def run() -> T:
        async with connected(address) as monitor:
            return await action(monitor)

    return asyncio.run(run())


def _exit_as(progress: Progress, wanted: str = "completed") -> None:
    if progress.status != wanted:
        raise typer.Exit(1)


@app.command()
def status(context: typer.Context) -> None:
    """Show the guest, the migration and what is switched on."""
    show_status(_with_monitor(context, read_status), console)


@app.command()
def watch(context: typer.Context) -> None:
    """Follow the migration until it ends."""

    async def action(monitor: Monitor) -> Progress:
        with make_display(console) as display:
            return await follow(monitor.query_migrate, display)

    _exit_as(_with_monitor(context, action))


@app.command()
def migrate(
    context: typer.Context,
    uri: Annotated[str, typer.Argument(help="where to: tcp:HOST:PORT, unix:PATH, file:PATH, …")],
    capability: Annotated[
        list[str] | None,
        typer.Option("--capability", "-c", help="switch a capability on, or off with NAME=off"),
    ] = None,
    max_bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="per second, 64M for example; 0: no limit")
    ] = None,
    cpr: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="hand its memory over by descriptors: cpr-transfer"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="do not follow it")] = False,
) -> None:
    """Send the guest and follow it until it has arrived."""
    parameters: dict[str, object] = {}
    target: dict[str, object] = {"uri": uri}
    if cpr is not None:
        parameters["mode"] = "cpr-transfer"
        target = {"channels": _cpr_channels(uri, cpr)}
    if max_bandwidth is not None:
        parameters["max-bandwidth"] = parse_size(max_bandwidth)
    states = [_capability_state(text) for text in capability or ()]

    async def action(monitor: Monitor) -> Progress | None:
        if states:
            await monitor.execute("migrate-set-capabilities", {"capabilities": states})
        if parameters:
            await monitor.execute("migrate-set-parameters", parameters)
        await monitor.execute("migrate", target)
        if detach:
            return None
        with make_display(console) as display:
            return await follow(monitor.query_migrate, display, ends_when_waiting=True)

    progress = _with_monitor(context, action)
    if progress is not None:
        _exit_as(progress)


def _cpr_channels(uri: str, path: str) -> list[dict[str, object]]:
    address = parse_uri(uri)
    if not isinstance(address, InetAddress | UnixAddress):
        raise typer.BadParameter("--cpr needs a main channel over tcp: or unix:")
    cpr = UnixAddress(path)
    return [
        {"channel-type": kind, "addr": {"transport": "socket", **socket_address_to_qapi(at)}}
        for kind, at in (("main", address), ("cpr", cpr))
    ]


def _capability_state(text: str) -> dict[str, object]:
    name, _, value = text.partition("=")
    if value not in ("", "on", "off"):
        raise typer.BadParameter(f"'{text}' is not NAME, NAME=on or NAME=off")
    return {"capability": name, "state": value != "off"}


@app.command("park")
def park_(
    context: typer.Context,
    daemon: Annotated[
        str, typer.Argument(metavar="DAEMON", help="QMP monitor of a migrationd with -incoming")
    ],
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="where a daemon with -incoming defer is to wait"),
    ] = None,
    connect: Annotated[
        str | None,
        typer.Option(metavar="URI", help="how the source reaches it, if that is another address"),
    ] = None,
    channels: Annotated[
        int, typer.Option(min=0, max=255, help="multifd channels; 0: a single connection")
    ] = 0,
    max_bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="per second, 64M for example; 0: no limit")
    ] = None,
) -> None:
    """Move the running guest of -s into a daemon that holds it."""
    from migrationd.ctl.escrow import local_addresses
    from migrationd.ctl.park import ParkPlan, park

    limit = parse_size(max_bandwidth) if max_bandwidth is not None else None

    async def run(source: Monitor) -> Progress:
        async with connected(daemon) as target, local_addresses() as (here, _):
            plan = ParkPlan(uri or here, connect, channels, limit)
            return await park(source, target, plan, console)

    _exit_as(_with_monitor(context, run))


@app.command()
def resume(
    context: typer.Context,
    uri: Annotated[str, typer.Argument(help="where to: tcp:HOST:PORT or unix:PATH")],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="let it run there at once, its memory follows")
    ] = False,
    preempt: Annotated[
        bool, typer.Option("--preempt", help="with a channel of their own for requested pages")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="do not follow it")] = False,
) -> None:
    """Send the parked guest where it is to run; or go on with a postcopy that is paused."""
    if preempt and not lazy:
        raise typer.BadParameter("it belongs to --lazy", param_hint="--preempt")

    async def action(monitor: Monitor) -> Progress | None:
        info = await monitor.query_migrate()
        if info.get("status") == "postcopy-paused":
            await monitor.execute("migrate", {"uri": uri, "resume": True})
        else:
            names = ("postcopy-ram", "postcopy-preempt") if lazy else ()
            states = [{"capability": "events", "state": True}]
            states += [{"capability": name, "state": True} for name in names[: 1 + preempt]]
            await monitor.execute("migrate-set-capabilities", {"capabilities": states})
            commands = [monitor.execute("migrate", {"uri": uri})]
            if lazy:
                # Sent behind it at once: before the first page.
                commands.append(monitor.execute("migrate-start-postcopy"))
            await asyncio.gather(*commands)
        if detach:
            return None
        with make_display(console) as display:
            return await follow(monitor.query_migrate, display, ends_when_waiting=True)

    progress = _with_monitor(context, action)
    if progress is not None:
        _exit_as(progress)


@app.command()
def cancel(context: typer.Context) -> None:
    """Cancel the migration and wait until it has ended."""

    async def action(monitor: Monitor) -> Progress:
        await monitor.execute("migrate_cancel")
        await _refuse_to_wait_where_a_guest_arrives(monitor)
        try:
            with make_display(console) as display:
                return await asyncio.wait_for(
                    follow(_none_means_cancelled(monitor), display), _CANCEL_TIMEOUT_S
                )
        except TimeoutError:
            raise ClientError(f"not cancelled within {_CANCEL_TIMEOUT_S:.0f} s") from None

    _exit_as(_with_monitor(context, action), "cancelled")


async def _refuse_to_wait_where_a_guest_arrives(monitor: Monitor) -> None:
    # A destination does not cancel: it would be waited for in vain.
    status = (await monitor.query_migrate()).get("status")
    if status in (None, "completed", "failed", "cancelled"):
        return
    if (await monitor.query("query-status")).get("status") == "inmigrate":
        raise ClientError("this end takes a guest: it is cancelled where the guest comes from")


def _none_means_cancelled(monitor: Monitor) -> Callable[[], Coroutine[object, object, Info]]:
    # Where nothing was under way there is nothing to wait for.
    async def query() -> Info:
        info = await monitor.query_migrate()
        return {**info, "status": "cancelled"} if "status" not in info else info

    return query


@app.command()
def demo(
    machine: Annotated[str, typer.Option(help="machine type: pc or q35, or one with a version")] = (
        "pc"
    ),
    qemu: Annotated[Path | None, typer.Option(help="QEMU to use for both ends")] = None,
    bandwidth: Annotated[
        str, typer.Option(metavar="SIZE", help="limit per second, to see it move; 0: full speed")
    ] = "96M",
    fill: Annotated[str, typer.Option(metavar="SIZE", help="random bytes in the guest")] = "192M",
    workload: Annotated[
        bool, typer.Option("--workload", help="move a live process, without any QEMU")
    ] = False,
) -> None:
    """Move a running guest QEMU → migrationd → QEMU and prove that nothing is lost.

    Where no QEMU is installed a live process moves instead.
    """
    from migrationd.ctl.demo import DemoPlan, run_demo
    from migrationd.ctl.demo_workload import run_workload_demo
    from migrationd.ctl.qemu_process import find_qemu

    if workload or (qemu is None and find_qemu() is None):
        if not workload:
            console.print(
                "No QEMU is installed (Debian: apt-get install qemu-system-x86): "
                "the guest of this demo is a live process.\n",
                highlight=False,
            )
        asyncio.run(run_workload_demo(console, parse_size(bandwidth)))
        return
    plan = DemoPlan(
        machine=machine,
        binary=str(qemu) if qemu else None,
        bandwidth_bytes_per_s=parse_size(bandwidth),
        fill_bytes=parse_size(fill),
    )
    asyncio.run(run_demo(plan, console))

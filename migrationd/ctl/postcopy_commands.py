"""``migrationctl start-postcopy``, ``pause`` and ``recover``: postcopy from a terminal."""

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from migrationd.ctl.client import ClientError, Monitor, connected
from migrationd.ctl.progress import Progress
from migrationd.ctl.watch import follow, make_display

PAUSED = "postcopy-paused"
SETTLE_S = 10.0
"""Longest wait for an end to notice that its connection is lost."""

_POLL_S = 0.05
_MIGRATING = ("postcopy-active", "postcopy-recover", "postcopy-recover-setup")


async def pause(monitor: Monitor) -> None:
    """End the connection of a postcopy at this end; it is told even if it hangs.

    Raises:
        ClientError: There is nothing to pause.
    """
    await monitor.execute("migrate-pause", oob=True)


async def recover(source: Monitor, destination: Monitor, listen: str, connect: str | None) -> None:
    """Connect the two ends of a paused postcopy again.

    An end that has not noticed yet is paused first. The destination is only spoken to out of
    band: a QEMU whose guest waits for a page may answer nothing else.

    Args:
        source: Where the rest of the memory is.
        destination: Where the guest is.
        listen: Where the destination is to wait.
        connect: Where the source is to go, if that is another address.

    Raises:
        ClientError: One of them refuses, or does not pause in time.
    """
    deadline = asyncio.get_running_loop().time() + SETTLE_S
    is_told = False
    while (status := (await source.query_migrate()).get("status")) != PAUSED:
        if status not in _MIGRATING:
            found = f"its status is '{status}'" if status else "it has not migrated"
            raise ClientError(f"the source has no postcopy to recover: {found}")
        if status == "postcopy-active" and not is_told:
            is_told = True
            await pause(source)
        await _wait(deadline, f"the source is still in '{status}'")
    is_told = False
    while True:
        try:
            await destination.execute("migrate-recover", {"uri": listen}, oob=True)
            break
        except ClientError as error:
            if "only be run when postcopy is paused" not in str(error):
                raise
            if not is_told:
                is_told = await _pause_unless_it_does(destination)
            await _wait(deadline, f"the destination does not pause: {error}")
    await source.execute("migrate", {"uri": connect or listen, "resume": True})
    deadline = asyncio.get_running_loop().time() + SETTLE_S
    while (info := await source.query_migrate()).get("status") == PAUSED:
        await _wait(deadline, f"the source is not connected: {info.get('error-desc', 'no reason')}")


async def _pause_unless_it_does(destination: Monitor) -> bool:
    try:
        await pause(destination)
        return True
    except ClientError as error:
        if "only supported during postcopy" not in str(error):
            raise
        return False


async def _wait(deadline: float, what: str) -> None:
    if asyncio.get_running_loop().time() > deadline:
        raise ClientError(f"{what} after {SETTLE_S:.0f} s")
    await asyncio.sleep(_POLL_S)


def register(app: typer.Typer, console: Console) -> None:
    """Add the commands."""

    async def follow_it(monitor: Monitor) -> Progress:
        with make_display(console) as display:
            return await follow(monitor.query_migrate, display, ends_when_waiting=True)

    @app.command("start-postcopy")
    def start_postcopy(
        context: typer.Context,
        detach: Annotated[bool, typer.Option("--detach", "-d", help="do not follow it")] = False,
    ) -> None:
        """Let the guest move now, its memory follows; postcopy-ram must be on at both ends."""

        async def run() -> Progress | None:
            async with connected(_address(context)) as monitor:
                await monitor.execute("migrate-start-postcopy")
                return None if detach else await follow_it(monitor)

        _exit_as(asyncio.run(run()))

    @app.command("pause")
    def pause_(context: typer.Context) -> None:
        """End the connection of a postcopy: out of a hang, or before its path goes away."""

        async def run() -> None:
            async with connected(_address(context)) as monitor:
                await pause(monitor)

        asyncio.run(run())

    @app.command("recover")
    def recover_(
        context: typer.Context,
        destination: Annotated[
            str, typer.Argument(metavar="SOCKET", help="the destination's QMP monitor")
        ],
        uri: Annotated[str, typer.Argument(help="where the destination is to wait")],
        connect: Annotated[
            str | None,
            typer.Option(metavar="URI", help="where the source is to go, if not to the same"),
        ] = None,
        detach: Annotated[bool, typer.Option("--detach", "-d", help="do not follow it")] = False,
    ) -> None:
        """Connect a postcopy again whose connection was lost; -s names the source's monitor."""

        async def run() -> Progress | None:
            async with (
                connected(_address(context)) as source,
                connected(destination) as target,
            ):
                await recover(source, target, uri, connect)
                return None if detach else await follow_it(source)

        _exit_as(asyncio.run(run()))

    @app.command("escrow")
    def escrow_(
        context: typer.Context,
        source: Annotated[
            str, typer.Argument(metavar="SOURCE", help="QMP monitor of the QEMU that runs it")
        ],
        destination: Annotated[
            str,
            typer.Argument(metavar="DEST", help="QMP monitor of a QEMU with -incoming defer"),
        ],
        via: Annotated[
            str | None, typer.Option(metavar="URI", help="where the daemon waits for the source")
        ] = None,
        to: Annotated[
            str | None, typer.Option(metavar="URI", help="where DEST waits for the daemon")
        ] = None,
        preempt: Annotated[
            bool, typer.Option(help="an own channel for pages that the guest waits for")
        ] = True,
    ) -> None:
        """Move a running guest over the daemon of -s: once it has left, its source may die.

        The daemon waits with -incoming defer, and -ram-dir if its copy is to outlive it.
        """
        from migrationd.ctl.escrow import EscrowPlan, escrow, local_addresses

        async def run() -> Progress:
            async with (
                connected(_address(context)) as daemon,
                connected(source) as from_,
                connected(destination) as target,
                local_addresses() as (here, there),
            ):
                plan = EscrowPlan(via or here, to or there, preempt)
                return await escrow(daemon, from_, target, plan, console)

        _exit_as(asyncio.run(run()))


def _address(context: typer.Context) -> str:
    address = context.obj
    if not isinstance(address, str) or not address:
        raise typer.BadParameter("say which monitor with -s SOCKET", param_hint="--socket")
    return address


def _exit_as(progress: Progress | None) -> None:
    if progress is not None and progress.status != "completed":
        raise typer.Exit(1)

"""``migrationctl escrow``: a running guest to another host, over a copy that outlives both ends.

    1  the guest runs on while all of its memory goes to the daemon (precopy)
    2  it is stopped for a moment; the daemon has the whole of it, durably with -ram-dir:
       from here on the source may die
    3  the guest goes on at the destination at once, its memory follows from the copy (postcopy)

Whatever fails before 2 leaves the guest at its source; afterwards the daemon holds it.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import EventListener
from rich.console import Console

from migrationd.ctl.client import ClientError, Monitor
from migrationd.ctl.progress import Progress
from migrationd.ctl.watch import follow, make_display

STARTS_S = 10.0
"""Longest wait for the destination to say that the guest runs there."""


@dataclass(frozen=True, slots=True)
class EscrowPlan:
    """How the guest goes.

    Attributes:
        via: Where the daemon waits for the source.
        to: Where the destination waits for the daemon.
        preempt: Whether requested pages get a channel of their own.
    """

    via: str
    to: str
    preempt: bool = True


@contextlib.asynccontextmanager
async def local_addresses() -> AsyncIterator[tuple[str, str]]:
    """Two places for listeners that live as long as the block."""
    with tempfile.TemporaryDirectory(prefix="migrationctl-") as directory:
        yield f"unix:{Path(directory) / 'in'}", f"unix:{Path(directory) / 'out'}"


async def escrow(
    daemon: Monitor, source: Monitor, destination: Monitor, plan: EscrowPlan, console: Console
) -> Progress:
    """Move the guest; returns the last look at the daemon's part.

    Args:
        daemon: migrationd with ``-incoming defer``.
        source: QEMU that runs the guest.
        destination: QEMU with ``-incoming defer``, made like the source.
        plan: How.
        console: Where to say what happens.

    Raises:
        ClientError: One of the three refuses, or the guest did not come to the daemon.
    """
    await check_waits(daemon, "the daemon")
    await check_waits(destination, "the destination")
    postcopy = {"postcopy-ram": True, "postcopy-preempt": plan.preempt}
    await destination.set_capabilities(postcopy)
    await destination.execute("migrate-incoming", {"uri": plan.to})
    await daemon.set_capabilities({"events": True, "postcopy-ram": False})
    await daemon.execute("migrate-incoming", {"uri": plan.via, "exit-on-error": False})
    await source.set_capabilities({"return-path": True, "postcopy-ram": False})
    with (
        daemon.listening("MIGRATION") as arrival,
        source.listening("STOP") as stops,
        destination.listening("RESUME") as starts,
    ):
        await source.execute("migrate", {"uri": plan.via})
        await _arrive(source, arrival, console)
        await daemon.set_capabilities(postcopy)
        await daemon.execute("migrate", {"uri": plan.to})
        await daemon.execute("migrate-start-postcopy")
        console.print("the daemon holds the guest: its source may be ended now", highlight=False)
        await _say_how_long(stops, starts, console)
        with make_display(console, "out") as display:
            return await follow(daemon.query_migrate, display, ends_when_waiting=True)


async def check_waits(monitor: Monitor, who: str) -> None:
    """Check that a monitor's process waits for a guest.

    Raises:
        ClientError: It does not.
    """
    state = (await monitor.query("query-status")).get("status")
    if state != "inmigrate":
        raise ClientError(f"{who} does not wait for a guest: its run state is '{state}'")


async def _arrive(source: Monitor, arrival: EventListener, console: Console) -> None:
    """Follow the source until the daemon has the guest; nothing is polled at the end."""

    async def show() -> None:
        with make_display(console, "in ") as display:
            last = await follow(source.query_migrate, display)
        if last.status != "completed":
            raise ClientError(f"the guest stays at its source: {last.error or last.status}")

    async def wait() -> None:
        async for event in arrival:
            data = event.get("data")
            status = data.get("status") if isinstance(data, dict) else None
            if status == "failed":
                raise ClientError("the guest stays at its source: the daemon refused it")
            if status == "completed":
                return

    shown, arrived = asyncio.create_task(show()), asyncio.create_task(wait())
    try:
        done, _ = await asyncio.wait((shown, arrived), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        # The source hears of it a moment later; the guest does not wait for that.
        await arrived
    finally:
        for task in (shown, arrived):
            task.cancel()
        await asyncio.gather(shown, arrived, return_exceptions=True)


async def _say_how_long(stops: EventListener, starts: EventListener, console: Console) -> None:
    """Say how long the guest stood still, by the two ends' clocks."""
    try:
        async with asyncio.timeout(STARTS_S):
            stopped, started = _seconds(await stops.get()), _seconds(await starts.get())
    except TimeoutError:
        console.print("the destination has not started the guest", highlight=False)
        return
    console.print(
        f"the guest goes on at its destination, it stood still for "
        f"{(started - stopped) * 1000:.0f} ms",
        highlight=False,
        soft_wrap=True,
    )


def _seconds(event: object) -> float:
    stamp = event["timestamp"]  # type: ignore[index]  # every event has one
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6

"""``migrationctl park``: a running guest from its QEMU into a daemon.

Both ends are told what they have to know: where the daemon waits, and what is switched on.
Whatever fails leaves the guest at its source.
"""

import asyncio
from dataclasses import dataclass

from rich.console import Console

from migrationd.ctl.client import ClientError, Monitor
from migrationd.ctl.escrow import check_waits
from migrationd.ctl.progress import Progress, size_text
from migrationd.ctl.status import read_status
from migrationd.ctl.watch import POLL_S, follow, make_display

HOLDS_S = 10.0
"""Longest wait for the daemon to hold what it has acknowledged."""


@dataclass(frozen=True, slots=True)
class ParkPlan:
    """How the guest goes.

    Attributes:
        uri: Where a daemon that was started with ``-incoming defer`` is to wait.
        connect: How the source reaches it, if that is another address.
        channels: multifd channels; 0 is a single connection.
        max_bandwidth_bytes_per_s: Limit; 0 is none, None what the source has set.
    """

    uri: str
    connect: str | None = None
    channels: int = 0
    max_bandwidth_bytes_per_s: int | None = None


async def park(source: Monitor, daemon: Monitor, plan: ParkPlan, console: Console) -> Progress:
    """Move the guest; returns the last look at the source.

    Args:
        source: QEMU that runs the guest, or a migrationd that holds it.
        daemon: migrationd that waits for it.
        plan: How.
        console: Where to say what happens.

    Raises:
        ClientError: One of the two refuses, or the guest stays at its source.
    """
    await check_waits(daemon, "the daemon")
    listening = (await read_status(daemon)).listening
    if not listening:
        await _prepare(daemon, plan)
        await daemon.execute("migrate-incoming", {"uri": plan.uri, "exit-on-error": False})
        listening = (await read_status(daemon)).listening
    elif plan.channels:
        raise ClientError(
            f"the daemon waits on {listening[0]} already, as it was told: channels can be chosen "
            "for one that was started with -incoming defer"
        )
    await _prepare(source, plan)
    # The source is done when the daemon says that it has the guest, not when all is sent.
    await source.set_capabilities({"return-path": True})
    if plan.max_bandwidth_bytes_per_s is not None:
        await source.execute(
            "migrate-set-parameters", {"max-bandwidth": plan.max_bandwidth_bytes_per_s}
        )
    uri = plan.connect or (listening[0] if listening else plan.uri)
    await source.execute("migrate", {"uri": uri})
    with make_display(console, "in ") as display:
        last = await follow(source.query_migrate, display)
    if last.status != "completed":
        raise ClientError(f"the guest stays at its source: {last.error or last.status}")
    run_state = await _wait_held(daemon)
    if plan.channels:
        # Chosen for this way only: who takes the guest next may know nothing of it.
        await daemon.set_capabilities({"multifd": False})
    console.print(
        f"parked: the daemon holds the guest, run state '{run_state}', "
        f"{size_text(last.total_bytes)} of RAM; migrationctl resume sends it on",
        highlight=False,
        soft_wrap=True,
    )
    return last


async def _prepare(monitor: Monitor, plan: ParkPlan) -> None:
    await monitor.set_capabilities({"multifd": plan.channels > 0, "postcopy-ram": False})
    if plan.channels:
        await monitor.execute("migrate-set-parameters", {"multifd-channels": plan.channels})


async def _wait_held(daemon: Monitor) -> str:
    """Wait until a daemon that has all of a guest holds it; returns the run state."""
    try:
        async with asyncio.timeout(HOLDS_S):
            while (state := (await daemon.query("query-status")).get("status")) == "inmigrate":
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise ClientError(
            "the source has sent all of the guest, and the daemon still does not hold it: "
            "look at query-migrate there before the source is ended"
        ) from error
    return str(state)

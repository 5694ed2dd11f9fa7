"""A guest that turns to postcopy on its way from a real QEMU into the daemon."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess, qemu_version
from tests.support.moves import Host, check_runs_on, memory_digest, move_on
from tests.support.postcopy import capabilities
from tests.support.starting import start_both

SLOW_BYTES_PER_S = 1 << 20
"""A precopy of this rate does not converge before it is told to turn."""

OFF = {"postcopy-ram": False, "postcopy-preempt": False, "multifd": False}
"""Capabilities of a daemon that sends its guest on by precopy."""


async def start_pair(
    host: Host, closing: list[object], *, arguments: Sequence[str] = (), stands: bool = False
) -> tuple[QemuProcess, DaemonProcess]:
    """A QEMU whose guest has counted, and a daemon that waits.

    Args:
        host: How QEMU is started.
        closing: Takes both.
        arguments: The daemon's.
        stands: Whether the guest stands still.
    """
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer", arguments=arguments)
    )
    await source.wait_serial(3)
    if stands or qemu_version(host.binary) == "11.1":
        # Under TCG its source loses dirty pages with postcopy-ram on, between two QEMUs too.
        await source.execute("stop")
    return source, daemon


async def on_to_qemu(
    source: QemuProcess,
    daemon: DaemonProcess,
    host: Host,
    directory: Path,
    closing: list[object],
    *,
    closes_source: bool = False,
) -> int:
    """Wait for the end, send the guest on by precopy, and prove that it is the same.

    Args:
        source: Where it came from.
        daemon: Where it went.
        host: How another QEMU is started.
        directory: For the socket.
        closing: Takes that QEMU.
        closes_source: Whether the source makes room for it.

    Returns:
        The guest's passes.
    """
    await daemon.wait_migration("completed")
    await source.wait_migration("completed")
    before = source.serial
    digest = await memory_digest(source, host)
    if closes_source:
        await source.close()
    await daemon.set_capabilities(OFF)
    arrived, target = await move_on(daemon, host, directory)
    closing.append(target)
    assert arrived == digest
    await target.execute("cont")
    return await check_runs_on(before, target, host)


async def begin(
    source: QemuProcess,
    daemon: DaemonProcess,
    uri: str,
    *,
    preempt: bool,
    postcopy_bytes_per_s: int = 0,
    listens: str | None = None,
    also: Mapping[str, bool] | None = None,
) -> None:
    """Start a migration and let it turn to postcopy; returns once it has.

    Args:
        source: QEMU with a running guest.
        daemon: Started with ``-incoming defer``.
        uri: Where the source goes.
        preempt: Whether there is a channel of urgent pages.
        postcopy_bytes_per_s: Rate of the background pages; 0 for no limit.
        listens: Where the daemon listens, if there is a network between them.
        also: Further capabilities of both.
    """
    switched = {**capabilities(preempt=preempt), **(also or {})}
    await daemon.set_capabilities(switched)
    await daemon.execute("migrate-incoming", {"uri": listens or uri, "exit-on-error": False})
    await source.set_capabilities(switched)
    await source.set_parameters(
        {"max-bandwidth": SLOW_BYTES_PER_S, "max-postcopy-bandwidth": postcopy_bytes_per_s}
    )
    await source.execute("migrate", {"uri": uri})
    await source.wait_migration("active")
    await source.execute("migrate-start-postcopy")


async def paused(*peers: QemuProcess | DaemonProcess) -> None:
    """Wait until every peer stands still."""
    for peer in peers:
        await peer.wait_migration("postcopy-paused")


async def resume(source: QemuProcess, daemon: DaemonProcess, uri: str, listens: str) -> None:
    """Let the source come back; returns when it is connected.

    Args:
        source: Paused.
        daemon: Paused.
        uri: Where the source goes.
        listens: Where the daemon waits.
    """
    since = len(daemon.events)
    await daemon.execute("migrate-recover", {"uri": listens})
    await source.execute("migrate", {"uri": uri, "resume": True})
    await daemon.wait_event(
        "MIGRATION", matching=lambda data: data["status"] == "postcopy-recover", since=since
    )

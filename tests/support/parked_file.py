"""A real guest saved to a plain migration file, and the daemons that hold it."""

from collections.abc import Sequence
from pathlib import Path

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import Host, check_runs_on, memory_digest, move_on


async def save_guest(host: Host, path: Path) -> tuple[str, str]:
    """Let a guest run, stop it and save it.

    Returns:
        SHA-256 of its RAM, and what it printed.
    """
    async with await host.start("QEMU A") as qemu:
        await qemu.wait_serial(4)
        await qemu.execute("stop")
        await qemu.migrate(f"exec:cat > {path}", return_path=False)
        await qemu.wait_migration("completed")
        return await memory_digest(qemu, host), qemu.serial


async def holder(
    path: Path, closing: list[object], *, arguments: Sequence[str] = ()
) -> DaemonProcess:
    """A daemon that has loaded the guest of a file.

    Args:
        path: The file.
        closing: Takes the daemon.
        arguments: Of the daemon.
    """
    daemon = await DaemonProcess.start(incoming=f"file:{path}", arguments=arguments)
    closing.append(daemon)
    await daemon.wait_run_state("paused")
    return daemon


async def expect_move(
    daemon: DaemonProcess,
    digest: str,
    serial: str,
    host: Host,
    directory: Path,
    closing: list[object],
) -> None:
    """Move the guest to a QEMU, where it must be the same and count on.

    Args:
        daemon: Who holds it.
        digest: Of its RAM.
        serial: What it has printed.
        host: How QEMU is started.
        directory: For the socket.
        closing: Takes the QEMU.
    """
    assert await daemon.run_state() == "paused"
    arrived, qemu = await move_on(daemon, host, directory)
    closing.append(qemu)
    assert arrived == digest
    await qemu.execute("cont")
    await check_runs_on(serial, qemu, host)

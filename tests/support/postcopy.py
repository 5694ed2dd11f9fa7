"""Postcopy between the daemon and a real QEMU, and out of the daemon."""

import asyncio
from collections.abc import Mapping

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import DEFAULT_TIMEOUT_S, PeerProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.events import statuses
from tests.support.moves import Host


def capabilities(*, preempt: bool) -> dict[str, bool]:
    """What both sides need."""
    return {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}


async def start_target(
    host: Host, uri: str, *, preempt: bool, name: str = "QEMU B", paused: bool = False,
    also: Mapping[str, bool] = {},
) -> QemuProcess:  # fmt: skip
    """A QEMU that waits for a postcopy, with further capabilities if they are given."""
    qemu = await host.start(name, incoming="defer", paused=paused)
    try:
        await qemu.set_capabilities({**capabilities(preempt=preempt), **also})
        await qemu.execute("migrate-incoming", {"uri": uri})
    except BaseException:
        await qemu.close()
        raise
    return qemu


async def send_lazily(
    daemon: DaemonProcess, uri: str, *, preempt: bool, parameters: Mapping[str, object] = {}
) -> None:
    """Begin a migration that goes to postcopy before any RAM to speak of is sent."""
    await daemon.set_capabilities(capabilities(preempt=preempt))
    # Memory waits for the second command, however late that one comes.
    await daemon.set_parameters({"max-bandwidth": 1 << 20, **parameters})
    await asyncio.gather(
        daemon.execute("migrate", {"uri": uri}), daemon.execute("migrate-start-postcopy")
    )


async def wait_status(peer: PeerProcess, status: str, times: int = 1) -> None:
    """Wait until a MIGRATION event with this status has come so often.

    A destination whose guest waits for a page may answer no command, so it is not asked.
    """
    async with asyncio.timeout(DEFAULT_TIMEOUT_S):
        while statuses(peer).count(status) < times:
            await asyncio.sleep(0.005)


async def recover(target: QemuProcess, uri: str) -> None:
    """``migrate-recover``, out of band: it is answered also by a QEMU that hangs."""
    await target.qmp.execute("migrate-recover", {"uri": uri}, oob=True)

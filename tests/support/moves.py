"""A guest from one QEMU into migrationd and on to another QEMU, and what proves that it came."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from migrationd.ctl.boot_guest import BootGuest, check_run
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.starting import start_both

VIRTIO = (
    "-blockdev",
    "driver=null-co,node-name=disk,size=67108864,read-zeroes=on",
    "-device",
    "virtio-blk-pci,drive=disk",
    "-device",
    "virtio-net-pci,romfile=",
)
"""A disk and a network card, the same on both ends."""


SMALL_GUEST = BootGuest(counted_pages=512, filled_pages=1024, pages_per_s=20000)


@dataclass(frozen=True, slots=True)
class Host:
    """How both QEMUs of a move are started.

    Attributes:
        binary: QEMU.
        machine: Machine type.
        guest: What runs in it.
        memory_mib: Guest RAM.
        arguments: Further arguments.
    """

    binary: str
    machine: str = "pc"
    guest: BootGuest = SMALL_GUEST
    memory_mib: int = 32
    arguments: tuple[str, ...] = VIRTIO

    async def start(
        self, name: str, *, incoming: str | None = None, paused: bool = False
    ) -> QemuProcess:
        """Start one of them."""
        return await QemuProcess.start(
            self.binary,
            machine=self.machine,
            memory_mib=self.memory_mib,
            guest=self.guest,
            arguments=self.arguments,
            incoming=incoming,
            paused=paused,
            name=name,
        )


def incoming_uri(transport: str, directory: Path, name: str) -> str:
    """Where a destination listens: a free port, or a socket in a directory."""
    return "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{directory}/{name}.sock"


async def source_uri(destination: DaemonProcess | QemuProcess, incoming: str) -> str:
    """Where a source connects to."""
    return await destination.listening_uri() if incoming.startswith("tcp:") else incoming


async def memory_digest(qemu: QemuProcess, host: Host) -> str:
    """SHA-256 of all guest RAM of a stopped guest."""
    start = 0x40000000 if host.guest.architecture == "aarch64" else 0
    data = await qemu.pmemsave(start, host.memory_mib << 20)
    return hashlib.sha256(data).hexdigest()


async def stand_still(qemu: QemuProcess) -> bool:
    """Stop a running guest that could arrive torn, through no fault of who takes it.

    On a busy machine 7.2's TCG does not note every write that follows a look at the dirty
    bitmap: 2 of 36 moves between two of them came with old pages, none of 10.0's and 11.1's.

    Returns:
        Whether it did; ``cont`` at whoever holds it then makes it run where it goes.
    """
    version = (await qemu.query("query-version"))["qemu"]
    assert isinstance(version, dict)
    if (version["major"], version["minor"]) != (7, 2) or await qemu.run_state() != "running":
        return False
    await qemu.execute("stop")
    return True


async def park(
    qemu: QemuProcess, daemon: DaemonProcess, uri: str, *, return_path: bool, is_live: bool = False
) -> None:
    """Move a guest from QEMU into the daemon; both must end completed.

    Args:
        qemu: Where it is.
        daemon: Waits for it.
        uri: Where.
        return_path: Whether the daemon answers.
        is_live: It writes on while it moves, although QEMU may lose writes.
    """
    was_stopped = not is_live and await stand_still(qemu)
    await qemu.migrate(uri, return_path=return_path)
    await qemu.wait_migration("completed")
    await daemon.wait_migration("completed")
    await daemon.wait_run_state("paused")
    if was_stopped:
        await daemon.execute("cont")


async def parked_guest(
    host: Host,
    directory: Path,
    closing: list[object],
    *,
    arguments: Sequence[str] = (),
    passes: int = 3,
    return_path: bool = True,
    is_live: bool = False,
) -> tuple[QemuProcess, DaemonProcess]:
    """Start a guest, let it count, and park it.

    Args:
        host: How.
        directory: For the socket between the two.
        closing: Takes both.
        arguments: The daemon's.
        passes: Letters that the guest prints before it moves.
        return_path: Whether the QEMU hears from the daemon.
        is_live: See ``park``.

    Returns:
        The QEMU that it left, and who holds it.
    """
    uri = f"unix:{directory}/in"
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming=uri, arguments=arguments)
    )
    await source.wait_serial(passes)
    await park(source, daemon, uri, return_path=return_path, is_live=is_live)
    return source, daemon


async def send(daemon: DaemonProcess, qemu: QemuProcess, uri: str, *, return_path: bool) -> None:
    """Move the daemon's guest to a QEMU; both must end completed."""
    await daemon.set_capabilities({"events": True, "return-path": return_path})
    await daemon.set_parameters({"max-bandwidth": 0})
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("completed")
    await qemu.wait_migration("completed")


async def move_on(daemon: DaemonProcess, host: Host, directory: Path) -> tuple[str, QemuProcess]:
    """Send the daemon's guest to a fresh, stopped QEMU.

    Returns:
        Digest of the RAM that arrived, and the QEMU.
    """
    uri = incoming_uri("unix", directory, "onward")
    qemu = await host.start("QEMU B", incoming=uri, paused=True)
    try:
        await send(daemon, qemu, uri, return_path=True)
        return await memory_digest(qemu, host), qemu
    except BaseException:
        await qemu.close()
        raise


async def check_runs_on(before: str, qemu: QemuProcess, host: Host, passes: int = 3) -> int:
    """Prove that a guest counts on in a QEMU without a gap.

    Args:
        before: What it printed until now.
        qemu: Where it runs.
        host: How it was started.
        passes: Letters to wait for.

    Returns:
        Passes in all.
    """
    await qemu.wait_serial(passes)
    await qemu.execute("stop")
    memory = await qemu.pmemsave(host.guest.counted_address, host.guest.counted_bytes)
    return check_run(before + qemu.serial, memory).passes

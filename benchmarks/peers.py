"""The peers of one benchmark: sources that stay, destinations that come and go."""

import contextlib
import shutil
from types import TracebackType
from typing import Self

from benchmarks.measure import (
    Sample,
    StatusProbe,
    fill_guest,
    migrate,
    peak_resident_bytes,
    warm_memory,
)
from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess

BESIDE_RAM_MIB = 32
"""Room for a machine's smaller RAM blocks."""

IDLE_MIB = 40
"""A daemon without any guest has at least so much resident."""

CONTENTS = ("random", "half zero")


class Bench:
    """Migrations of one guest between any two kinds of peer.

    Args:
        binary: QEMU.
        memory_mib: Guest RAM.
        content: What is in it, as :func:`fill_guest` knows it.
        channels: multifd channels; 0 is a single connection.
        compression: Of the channels.
        prealloc: Whether destinations have their memory before the source comes.

    Attributes:
        beyond_guest_bytes: Peaks of resident memory beyond the guest's RAM, of each daemon
            that took or gave a guest without zero pages.
    """

    def __init__(
        self,
        binary: str,
        memory_mib: int,
        content: str,
        channels: int = 0,
        compression: str = "none",
        *,
        prealloc: bool = True,
    ) -> None:
        self._binary = binary
        self._memory_mib = memory_mib
        self._content = content
        self._prealloc = prealloc
        self._capabilities = {"multifd": True} if channels else {}
        self._parameters: dict[str, object] = {}
        if channels:
            self._parameters |= {"multifd-channels": channels, "multifd-compression": compression}
        self._guest = BootGuest(counted_pages=256, pages_per_s=1000)
        self._stack = contextlib.AsyncExitStack()
        self._sources: dict[str, PeerProcess] = {}
        self.beyond_guest_bytes: list[int] = []

    async def __aenter__(self) -> Self:
        """Start both sources: a QEMU with a filled guest, and a daemon that was given it."""
        async with contextlib.AsyncExitStack() as stack:
            source = await stack.enter_async_context(await self._qemu(None))
            await source.wait_serial(2)
            await source.execute("stop")
            fill_guest(
                source.pid,
                self._memory_mib << 20,
                self._guest.needed_bytes,
                self._content,
            )
            daemon = await stack.enter_async_context(await self._daemon("-keep"))
            self._sources = {"QEMU": source, "migrationd": daemon}
            await self._listen(daemon)
            await self._prepare(source)
            await migrate(source, daemon, await daemon.listening_uri())
            await self._take_back(source)
            await self._prepare(daemon)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything."""
        await self._stack.aclose()

    async def sample(
        self, source_kind: str, destination_kind: str, latencies: list[float] | None = None
    ) -> Sample:
        """One migration.

        Args:
            source_kind: ``QEMU`` or ``migrationd``.
            destination_kind: The same.
            latencies: Where to put how long ``query-status`` took at the daemon meanwhile;
                the asking costs both of them time.
        """
        source = self._sources[source_kind]
        destination: PeerProcess
        warm_memory((self._memory_mib + 256) << 20)
        if destination_kind == "QEMU":
            destination = await self._qemu("defer")
        else:
            destination = await self._ready_daemon()
        async with destination:
            warm_memory((self._memory_mib + 256) << 20)
            await self._listen(destination)
            uri = await destination.listening_uri()
            if latencies is not None:
                asked = destination if destination_kind == "migrationd" else source
                probe = StatusProbe(f"{asked.directory}/probe.sock")
            result = await migrate(source, destination, uri)
            if latencies is not None:
                latencies += await probe.stop()
            for peer in (source, destination):
                self._gauge(peer)
        if source_kind == "QEMU":
            await self._take_back(source)
        return result

    async def _prepare(self, peer: PeerProcess) -> None:
        await peer.set_capabilities(self._capabilities)
        await peer.set_parameters(self._parameters)

    async def _listen(self, destination: PeerProcess) -> None:
        await self._prepare(destination)
        await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})

    def _gauge(self, peer: PeerProcess) -> None:
        if isinstance(peer, DaemonProcess) and self._content == "random":
            beyond = peak_resident_bytes(peer.pid) - (self._memory_mib << 20)
            self.beyond_guest_bytes.append(beyond)

    async def _take_back(self, source: PeerProcess) -> None:
        """Let a QEMU whose guest has left have it back, stopped."""
        await source.execute("cont")
        await source.execute("stop")

    async def _qemu(self, incoming: str | None) -> QemuProcess:
        size = f"{self._memory_mib}M"
        prealloc = "on" if self._prealloc else "off"
        return await QemuProcess.start(
            self._binary,
            machine="pc,memory-backend=ram0",
            memory_mib=self._memory_mib,
            guest=self._guest,
            arguments=["-object", f"memory-backend-ram,id=ram0,size={size},prealloc={prealloc}"],
            incoming=incoming,
            timeout_s=60,
        )

    async def _ready_daemon(self) -> DaemonProcess:
        """A destination; QEMU answers only when it has its memory, the daemon before."""
        if not self._prealloc:
            return await self._daemon()
        size = self._memory_mib + BESIDE_RAM_MIB
        daemon = await self._daemon("-ram-prealloc", f"{size}M")
        await daemon.wait_resident((size + IDLE_MIB) << 20)
        return daemon

    async def _daemon(self, *arguments: str) -> DaemonProcess:
        directory = DaemonProcess.make_directory()
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        probe = f"unix:{directory}/probe.sock,server=on,wait=off"
        daemon = await DaemonProcess.start(
            incoming="defer",
            arguments=["-log-level", "warning", "-qmp", probe, *arguments],
        )
        (daemon.directory / "probe.sock").symlink_to(directory / "probe.sock")
        return daemon

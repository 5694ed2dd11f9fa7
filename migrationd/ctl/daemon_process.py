"""A ``migrationd`` of our own as a child process, for the demo and the tests."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Self

from migrationd.ctl.peer_process import DEFAULT_TIMEOUT_S, PeerError, PeerProcess


class DaemonProcess(PeerProcess):
    """A migrationd, run by this interpreter, with a QMP monitor."""

    @classmethod
    async def start(
        cls,
        *,
        incoming: str | None = None,
        arguments: Sequence[str] = (),
        name: str = "migrationd",
        pass_fds: Sequence[int] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Self:
        """Start migrationd and connect to its monitor.

        Args:
            incoming: Value of ``-incoming``, or None.
            arguments: Further arguments.
            name: How messages call this process.
            pass_fds: Descriptors that it inherits.
            timeout_s: How long the start may take.

        Raises:
            PeerError: It ended at once; the text says what it printed.
        """
        directory = cls.make_directory()
        command = [sys.executable, "-m", "migrationd"]
        command += ["-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"]
        command += ["-incoming", incoming] if incoming else []
        command += arguments
        return await cls.spawn(
            command, name=name, directory=directory, pass_fds=pass_fds, timeout_s=timeout_s
        )

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    async def wait_resident(self, least_bytes: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait until the process has so much memory resident, as with ``-ram-prealloc``.

        Raises:
            PeerError: It has not, in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (resident := self.resident_bytes) < least_bytes:
            if asyncio.get_running_loop().time() > deadline:
                raise PeerError(f"{self.name}: {resident} of {least_bytes} bytes are resident")
            await asyncio.sleep(0.02)

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the process, with the guest's RAM that it holds."""
        with open(f"/proc/{self.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

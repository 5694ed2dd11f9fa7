"""A real QEMU as a child process, for the demo and the tests.

Binaries of several releases are found in ``$MIGRATIOND_QEMU_DIR`` (by default
``~/.cache/migrationd/qemu``) as ``VERSION/qemu-system-ARCHITECTURE``, and on ``$PATH``.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.peer_process import DEFAULT_TIMEOUT_S, PeerError, PeerProcess


def qemu_directory() -> Path:
    """Return the directory that holds further QEMU releases, one folder each."""
    default = Path.home() / ".cache" / "migrationd" / "qemu"
    return Path(os.environ.get("MIGRATIOND_QEMU_DIR", default))


@cache
def qemu_version(binary: str) -> str:
    """Return a binary's release as ``MAJOR.MINOR``.

    Raises:
        PeerError: It does not say.
    """
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"{binary} cannot be run: {error}") from error
    found = re.search(r"version (\d+\.\d+)", text.stdout)
    if found is None:
        raise PeerError(f"{binary} does not tell its version: {text.stdout[:80]!r}")
    return found[1]


def find_qemu(version: str | None = None, architecture: str = "x86_64") -> str | None:
    """Find a QEMU binary.

    Args:
        version: Release as ``MAJOR.MINOR``, or None for the one on the path.
        architecture: As in ``qemu-system-ARCHITECTURE``.

    Returns:
        Its path, or None where there is none.
    """
    name = f"qemu-system-{architecture}"
    on_path = shutil.which(name)
    if on_path is not None and (version is None or qemu_version(on_path) == version):
        return on_path
    folders = (
        sorted(qemu_directory().glob("*")) if version is None else [qemu_directory() / version]
    )
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    return None


def installed_versions(architecture: str = "x86_64") -> list[str]:
    """List the releases that ``find_qemu`` finds, oldest first."""
    name = f"qemu-system-{architecture}"
    versions = {
        path.parent.name for path in qemu_directory().glob(f"*/{name}") if os.access(path, os.X_OK)
    }
    on_path = shutil.which(name)
    if on_path is not None:
        versions.add(qemu_version(on_path))
    return sorted(versions, key=lambda text: [int(part) for part in text.split(".")])


class QemuProcess(PeerProcess):
    """A QEMU with a boot guest or a ROM, a QMP monitor and a serial port in a file."""

    @classmethod
    async def start(
        cls,
        binary: str | None = None,
        *,
        machine: str = "pc",
        memory_mib: int = 128,
        guest: BootGuest | None = None,
        bios: Path | None = None,
        devices: Sequence[str] = (),
        incoming: str | None = None,
        paused: bool = False,
        accelerator: str = "tcg",
        cpu: str | None = None,
        arguments: Sequence[str] = (),
        name: str = "QEMU",
        pass_fds: Sequence[int] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Self:
        """Start QEMU and connect to its monitor.

        Args:
            binary: QEMU to run; by default the path's, for the guest's architecture.
            machine: Machine type, with its options.
            memory_mib: Guest RAM.
            guest: Boot guest; both ends of a migration need the same.
            bios: A ROM file in its place.
            devices: Values of ``-device``; none is there by default (``-nodefaults``).
            incoming: Value of ``-incoming``: the guest comes over a migration.
            paused: Do not start the guest (``-S``).
            accelerator: ``tcg`` or ``kvm``.
            cpu: CPU model, or None for the machine's own.
            arguments: Further arguments.
            name: How messages call this process.
            pass_fds: Descriptors that it inherits.
            timeout_s: How long the start may take.

        Raises:
            PeerError: There is no such QEMU, or it ended at once.
        """
        architecture = guest.architecture if guest else "x86_64"
        binary = binary or find_qemu(architecture=architecture)
        if binary is None:
            package = "arm" if architecture == "aarch64" else "x86"
            raise PeerError(
                f"qemu-system-{architecture} is not installed "
                f"(Debian: apt-get install qemu-system-{package})"
            )
        if guest is not None and guest.needed_bytes > memory_mib << 20:
            raise PeerError(f"the boot guest needs more than {memory_mib} MiB of RAM")
        directory = cls.make_directory()
        if guest is not None:
            bios = guest.write_image(directory)
        command = [binary, "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-machine", f"{machine},accel={accelerator}", "-m", str(memory_mib)]
        command += ["-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"]
        command += ["-serial", f"file:{directory}/serial", "-name", name]
        if cpu is None and architecture == "aarch64":
            cpu = "cortex-a57"
        command += ["-cpu", cpu] if cpu else []
        command += ["-bios", str(bios)] if bios else []
        command += ["-incoming", incoming] if incoming else []
        command += ["-S"] if paused else []
        for device in devices:
            command += ["-device", device]
        command += arguments
        return await cls.spawn(
            command, name=name, directory=directory, pass_fds=pass_fds, timeout_s=timeout_s
        )

    @property
    def serial(self) -> str:
        """What the guest printed in this QEMU so far."""
        path = self.directory / "serial"
        return path.read_text(encoding="latin-1") if path.exists() else ""

    async def wait_serial(self, characters: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
        """Wait until the guest has printed so many characters in this QEMU.

        Raises:
            PeerError: It has not, in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while len(text := self.serial) < characters:
            if self.returncode is not None:
                raise self._ended()
            if asyncio.get_running_loop().time() > deadline:
                raise PeerError(
                    f"{self.name}: the guest printed {text!r} in {timeout_s} s, "
                    f"expected {characters} characters"
                )
            await asyncio.sleep(0.005)
        return text

    async def pmemsave(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory; stop the guest first for a consistent picture."""
        path = self.directory / "pmemsave"
        arguments = {"val": address, "size": size_bytes, "filename": str(path)}
        await self.execute("pmemsave", arguments)
        data = path.read_bytes()
        path.unlink()
        return data

    async def migrate(
        self, uri: str, *, return_path: bool = True, max_bandwidth: int | None = 0
    ) -> None:
        """Begin an outgoing migration.

        Args:
            uri: Where to.
            return_path: Whether the destination is to answer.
            max_bandwidth: Bytes per second; 0 for no limit, None to leave it alone.
        """
        await self.set_capabilities({"events": True, "return-path": return_path})
        if max_bandwidth is not None:
            await self.set_parameters({"max-bandwidth": max_bandwidth})
        await self.execute("migrate", {"uri": uri})

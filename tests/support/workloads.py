"""Live processes and their daemons, ready to move from one to the other."""

import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess, Progress
from migrationd.linux.pagemap import can_scan
from tests.support.starting import start_both

needs_scan = pytest.mark.skipif(not can_scan(), reason="PAGEMAP_SCAN needs Linux 6.7")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two workloads and their daemons."""

    source: DaemonProcess
    destination: DaemonProcess
    here: DirtierProcess
    there: DirtierProcess

    async def begin(self, max_bandwidth: int = 0, **capabilities: bool) -> None:
        """Start the migration."""
        for daemon in (self.source, self.destination):
            await daemon.set_capabilities({"events": True})
        await self.source.set_capabilities(
            {"return-path": True}
            | {name.replace("_", "-"): on for name, on in capabilities.items()}
        )
        await self.source.set_parameters({"max-bandwidth": max_bandwidth})
        await self.source.execute("migrate", {"uri": await self.destination.listening_uri()})


async def goes_on(there: DirtierProcess, last: Progress | None) -> None:
    """Wait until it has made two passes there, behind where it was last elsewhere."""
    after = await there.wait_passes(2)
    assert last is not None
    assert after.place > last.place


@contextlib.asynccontextmanager
async def pair(
    directory: Path,
    *,
    mib: int = 16,
    rate_mb_s: float = 40.0,
    there_program: Path = PROGRAM,
    binary: Path | None = None,
    multifd: str | None = None,
    incoming: dict[str, bool] | None = None,
    uri: str = "tcp:127.0.0.1:0",
    tracking: str = "auto",
    huge: tuple[bool, bool] = (False, False),
    tls: Path | None = None,
) -> AsyncIterator[Pair]:
    """Two dirtiers, the first of them running, and daemons that are ready for a migration.

    Args:
        directory: For their files.
        mib: Memory that they write.
        rate_mb_s: Memory that they write a second.
        there_program: Source of the second one.
        binary: A compiled program for both instead.
        multifd: ``multifd-compression`` of both, if they use multifd.
        incoming: Capabilities of the destination.
        uri: Where it listens.
        tracking: How the source tracks writes.
        huge: Which of them have their memory in huge pages.
        tls: Certificates of both ends, if their connections are encrypted.
    """
    here = DirtierProcess(
        directory, "here", mib=mib, rate_mb_s=rate_mb_s, binary=binary, huge=huge[0]
    )
    there = DirtierProcess(
        directory,
        "there",
        mib=mib,
        rate_mb_s=rate_mb_s,
        program=there_program,
        binary=binary,
        huge=huge[1],
    )
    async with contextlib.AsyncExitStack() as stack:
        source, destination = await start_both(
            stack,
            DaemonProcess.start(arguments=["-guest", f"attach:{here.socket},tracking={tracking}"]),
            DaemonProcess.start(incoming="defer", arguments=there.daemon_arguments),
        )
        if multifd is not None:
            for daemon in (source, destination):
                await daemon.set_capabilities({"multifd": True})
                await daemon.set_parameters({"multifd-compression": multifd})
        if tls is not None:
            for daemon, end in ((source, "client"), (destination, "server")):
                names = {"qom-type": "tls-creds-x509", "id": end, "endpoint": end}
                await daemon.execute("object-add", {**names, "dir": str(tls)})
                await daemon.set_parameters({"tls-creds": end})
        await destination.set_capabilities(incoming or {})
        await destination.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        await stack.enter_async_context(here)
        await stack.enter_async_context(there)
        await here.wait_running()
        await source.wait_run_state("running")
        yield Pair(source, destination, here, there)


def compile_counter(directory: Path) -> Path:
    """Make the example in C; the test is skipped without a compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc")
    binary = directory / "counter"
    source = PROGRAM.parent / "c" / "counter.c"
    flags = ["-Wall", "-Wextra", "-Werror", "-O2", "-lpthread"]
    subprocess.run(["cc", *flags, "-o", binary, source], check=True)
    return binary

"""Tables at the end of a run; what is missing is said, never silent."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrationd.ctl.qemu_process import find_qemu
from tests.support.moves import Host
from tests.support.parked_file import save_guest
from tests.support.results import TABLES, render


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print the tables that tests have filled."""
    for title, rows in config.stash.get(TABLES, {}).items():
        terminalreporter.section(title)
        for line in render(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def qemu_host() -> Host:
    """The QEMU on the path with a small boot guest."""
    binary = find_qemu()
    if binary is None:
        pytest.skip("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
    return Host(binary)


@pytest.fixture(scope="session")
def parked_file(qemu_host: Host, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A plain migration file of a real guest: its path, RAM digest and serial output."""
    path = tmp_path_factory.mktemp("parked") / "guest.mig"
    digest, serial = asyncio.run(save_guest(qemu_host, path))
    return path, digest, serial


@pytest.fixture
async def closing() -> AsyncIterator[list[object]]:
    """Peers that are closed at the end of a test."""
    peers: list[object] = []
    yield peers
    for peer in peers:
        await peer.close()  # type: ignore[attr-defined]  # anything with an async close

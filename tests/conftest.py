"""Tables at the end of a run; what is missing is said, never silent."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from migrationd.ctl.qemu_process import find_qemu, installed_versions, qemu_directory
from tests.support.moves import Host
from tests.support.parked_file import save_guest
from tests.support.releases import RELEASES, how_to_install, qemu_binary
from tests.support.results import TABLES, render

# Examples are the same in every run, and how long one takes is the machine's affair.
ANY_MACHINE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("any machine", ANY_MACHINE)
settings.register_profile("explore", ANY_MACHINE, derandomize=False)
settings.load_profile("any machine")

DESELECTED = pytest.StashKey[int]()


def missing_programs() -> list[str]:
    """What this machine lacks, with the way to get it."""
    wanted: list[tuple[str | None, str]] = [(None, "x86_64"), (None, "aarch64")]
    wanted += [(release, "x86_64") for release in RELEASES]
    return [how_to_install(*qemu) for qemu in wanted if find_qemu(*qemu) is None]


def pytest_configure(config: pytest.Config) -> None:
    """Let a thousand daemons not be compiled a thousand times where no bytecode is written."""
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        cache = tempfile.TemporaryDirectory(prefix="migrationd-bytecode-")
        os.environ.setdefault("PYTHONPYCACHEPREFIX", cache.name)
        config.add_cleanup(cache.cleanup)


def pytest_report_header() -> list[str]:
    """Say which QEMUs the tests will use."""
    found = ", ".join(installed_versions()) or "none"
    return [f"QEMU: {found} (on the path and in {qemu_directory()})"]


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what the full matrix would run besides."""
    for item in items:
        if "matrix" in item.keywords:
            stash = item.config.stash
            stash[DESELECTED] = stash.get(DESELECTED, 0) + 1


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print the tables that tests have filled, and what was not run."""
    for title, rows in config.stash.get(TABLES, {}).items():
        terminalreporter.section(title)
        for line in render(rows):
            terminalreporter.write_line(line)
    left = [f"missing here: {program}" for program in missing_programs()]
    if deselected := config.stash.get(DESELECTED, 0):
        left.append(f"{deselected} tests of the full matrix: make interop runs them")
    if left:
        terminalreporter.section("not run")
        for line in left:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def qemu_host() -> Host:
    """The QEMU on the path with a small boot guest."""
    return Host(qemu_binary())


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

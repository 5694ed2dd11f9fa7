"""What several tests of faults begin with."""

from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.parked_file import holder


@pytest.fixture
async def parked(
    parked_file: tuple[Path, str, str], closing: list[object]
) -> tuple[DaemonProcess, str, str]:
    """A daemon that holds a real guest; the digest of its RAM and what it printed."""
    path, digest, serial = parked_file
    daemon = await holder(path, closing)
    await daemon.set_capabilities({"events": True})
    return daemon, digest, serial

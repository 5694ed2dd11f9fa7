"""A saved state of a parked guest is taken up again after the guest ran elsewhere, and runs on."""

from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import until
from tests.support.moves import Host, check_runs_on, move_on

pytestmark = pytest.mark.interop


async def run_job(daemon: DaemonProcess, command: str) -> str | None:
    """Run a snapshot job to its end and dismiss it; its error or None."""
    arguments: dict[str, object] = {"job-id": "job", "tag": "before", "devices": ["ram-dir"]}
    await daemon.execute(command, {**arguments, "vmstate": "ram-dir"})
    found: dict[str, str] = {}

    async def is_concluded() -> bool:
        jobs = await daemon.execute("query-jobs")
        assert isinstance(jobs, list)
        found.update(jobs[0])
        return found["status"] == "concluded"

    await until(is_concluded, f"the end of {command}")
    await daemon.execute("job-dismiss", {"id": "job"})
    return found.get("error")


async def test_a_guest_goes_back_to_a_saved_state(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    path, digest, serial = parked_file
    daemon = await DaemonProcess.start(
        incoming=f"file:{path}", arguments=("-name", "vm1", "-ram-dir", str(tmp_path / "ram"))
    )
    closing.append(daemon)
    await daemon.wait_run_state("paused")
    assert await run_job(daemon, "snapshot-save") is None
    arrived, first = await move_on(daemon, qemu_host, tmp_path)
    assert arrived == digest
    await first.execute("cont")
    await check_runs_on(serial, first, qemu_host)
    await first.close()
    assert await run_job(daemon, "snapshot-load") == "The guest was handed over; cont takes it back"
    await daemon.execute("cont")
    assert await run_job(daemon, "snapshot-load") is None
    await daemon.execute("stop")
    again, second = await move_on(daemon, qemu_host, tmp_path)
    closing.append(second)
    assert again == digest
    await second.execute("cont")
    await check_runs_on(serial, second, qemu_host)

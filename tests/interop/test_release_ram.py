"""``release-ram``: what a source held goes back to the system when a postcopy is complete."""

import re
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.boot_guest import BootGuest
from tests.support.deadline import until
from tests.support.moves import Host, check_runs_on, parked_guest
from tests.support.postcopy import send_lazily, start_target
from tests.support.workloads import needs_scan, pair

pytestmark = pytest.mark.interop

GUEST = BootGuest(counted_pages=256, filled_pages=16384, pages_per_s=20000)
FILLED_BYTES = GUEST.filled_pages * 4096


@pytest.mark.parametrize("releases", [True, False])
async def test_a_parked_guest_that_left_by_postcopy(
    releases: bool, qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    host = Host(qemu_host.binary, "pc", GUEST, memory_mib=128)
    source, daemon = await parked_guest(host, tmp_path, closing, passes=2)
    target = await start_target(host, f"unix:{tmp_path}/out", preempt=False)
    closing.append(target)
    await daemon.set_capabilities({"release-ram": releases})
    held = daemon.resident_bytes
    await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False)
    await daemon.wait_migration("completed")
    await check_runs_on(source.serial, target, host, passes=3)
    if not releases:
        assert daemon.resident_bytes > held - FILLED_BYTES // 4
        await daemon.execute("cont")
        return

    async def is_released() -> bool:
        return daemon.resident_bytes < held - FILLED_BYTES * 3 // 4

    await until(is_released, "that the memory is given back")
    with pytest.raises(QMPError, match="none is left here"):
        await daemon.execute("cont")
    with pytest.raises(QMPError, match="Can't migrate the vm"):
        await daemon.execute("migrate", {"uri": "tcp:127.0.0.1:1"})


@needs_scan
async def test_a_process_that_left_by_postcopy(tmp_path: Path) -> None:
    async with pair(tmp_path, incoming={"postcopy-ram": True}) as two:
        await two.here.wait_passes(1)

        def shared_bytes() -> int:
            status = Path(f"/proc/{two.here.process.pid}/status").read_text()
            found = re.search(r"RssShmem:\s*(\d+) kB", status)
            assert found is not None
            return int(found[1]) << 10

        assert shared_bytes() >= 16 << 20
        await two.source.set_capabilities({"postcopy-ram": True, "release-ram": True})
        await two.source.set_parameters({"max-bandwidth": 8 << 20})
        await two.source.execute("migrate", {"uri": await two.destination.listening_uri()})
        await two.source.wait_migration("active")
        await two.source.execute("migrate-start-postcopy")
        await two.source.wait_migration("completed")
        await two.there.wait_passes(2)

        async def is_released() -> bool:
            return shared_bytes() < 1 << 20

        await until(is_released, "that the memory is given back")
        with pytest.raises(QMPError, match="none is left here"):
            await two.source.execute("cont")

"""A guest in huge pages in by postcopy, and out by postcopy into huge pages."""

from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support import postcopy_in
from tests.support.moves import VIRTIO, Host, check_runs_on
from tests.support.postcopy import send_lazily, start_target
from tests.support.releases import RELEASES, qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

MEMORY_MIB = 64
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


TABLE = "postcopy in out of huge pages, and out into huge pages"


@pytest.mark.matrix
@pytest.mark.parametrize("store", ["memory", "file"])
@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", RELEASES)
async def test_huge_pages_go_whole(
    version: str,
    preempt: bool,
    store: str,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    if not HUGE_PAGES.exists() or int(HUGE_PAGES.read_text()) < MEMORY_MIB:
        pytest.skip(f"{MEMORY_MIB} huge pages: sysctl vm.nr_hugepages sets some aside")
    backend = f"memory-backend-memfd,id=ram0,size={MEMORY_MIB}M,hugetlb=on,hugetlbsize=2M"
    host = Host(
        qemu_binary(version), "pc,memory-backend=ram0", memory_mib=MEMORY_MIB,
        arguments=(*VIRTIO, "-object", backend),
    )  # fmt: skip
    source = await host.start("QEMU A")
    closing.append(source)
    resting = ["-ram-dir", str(tmp_path / "ram"), "-name", "g"] if store == "file" else []
    daemon = await DaemonProcess.start(incoming="defer", arguments=resting)
    closing.append(daemon)
    await source.wait_serial(3)
    await postcopy_in.begin(source, daemon, f"unix:{tmp_path}/in.sock", preempt=preempt)
    await daemon.wait_migration("completed")
    await source.wait_migration("completed")
    before = source.serial
    await source.close()
    if store == "file":
        # What the next daemon knows of the pages is what rests beside the guest.
        await daemon.close()
        daemon = await DaemonProcess.start(arguments=resting)
        closing.append(daemon)
    target = await start_target(host, f"unix:{tmp_path}/out", preempt=preempt)
    closing.append(target)
    await send_lazily(
        daemon, f"unix:{tmp_path}/out", preempt=preempt,
        parameters={"max-postcopy-bandwidth": 16 << 20},
    )  # fmt: skip
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    passes = await check_runs_on(before, target, host)
    channels = "preempt" if preempt else "plain"
    add_row(
        request.config,
        TABLE,
        (version, channels, store, f"yes, {passes} passes"),
        head=("QEMU", "channels", "guest in", "counts on"),
    )

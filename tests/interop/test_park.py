"""``migrationctl park`` and ``resume``, as a person types them, with a real QEMU at both ends."""

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.ctl import ctl
from tests.support.moves import Host, check_runs_on
from tests.support.releases import qemu_binary
from tests.support.starting import start_both

pytestmark = pytest.mark.interop

GUEST = BootGuest(counted_pages=256, filled_pages=4096, pages_per_s=20000)


@pytest.mark.parametrize(
    ("incoming", "options"),
    [("defer", ("--channels", "2")), ("defer", ()), ("tcp:127.0.0.1:0", ("--max-bandwidth", "0"))],
    ids=["multifd", "where it is told to wait", "where it waits already"],
)
async def test_a_guest_is_parked_and_runs_on(
    incoming: str, options: tuple[str, ...], closing: list[object]
) -> None:
    host = Host(qemu_binary(), guest=GUEST, memory_mib=64)
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming=incoming)
    )
    await source.wait_serial(3)
    for peer in (source, daemon):
        await peer.qmp.disconnect()
    code, text = await ctl("-s", str(source.qmp_path), "park", str(daemon.qmp_path), *options)
    assert code == 0, text
    assert "parked: the daemon holds the guest, run state 'paused', 64.3 MiB of RAM" in text
    assert text.rstrip().endswith("; migrationctl resume sends it on")
    before = source.serial
    code, text = await ctl("-s", str(source.qmp_path), "park", str(daemon.qmp_path), *options)
    assert code == 1
    assert "the daemon does not wait for a guest: its run state is 'paused'" in text
    target = await host.start("QEMU B", incoming="tcp:127.0.0.1:0")
    closing.append(target)
    uri = await target.listening_uri()
    code, text = await ctl("-s", str(daemon.qmp_path), "resume", uri)
    assert code == 0, text
    await check_runs_on(before, target, host)


async def test_a_cancel_where_a_guest_is_awaited_does_not_wait(closing: list[object]) -> None:
    daemon = await DaemonProcess.start(incoming="tcp:127.0.0.1:0")
    closing.append(daemon)
    await daemon.qmp.disconnect()
    code, text = await ctl("-s", str(daemon.qmp_path), "cancel")
    assert code == 1, text
    assert "it is cancelled where the guest comes from" in text

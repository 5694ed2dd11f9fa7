"""cpr-reboot: state in a file, memory in another one that both ends share, or all of it in one."""

import contextlib
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import DirtierProcess
from migrationd.ctl.peer_process import PeerProcess
from tests.interop.test_cpr import names
from tests.support.moves import SMALL_GUEST, VIRTIO, Host, check_runs_on, memory_digest
from tests.support.releases import qemu_binary
from tests.support.workloads import goes_on

pytestmark = pytest.mark.interop

MEMORY_MIB = 32
ALL_PAGES = (MEMORY_MIB << 20) // 4096
IN_ORDER = ["setup", "STOP", "active", "device", "completed"]


def host(version: str, directory: Path, *, is_shared: bool) -> Host:
    """A QEMU, with its memory in a file of the directory if it is shared."""
    binary = qemu_binary(version)
    if not is_shared:
        return Host(binary, "pc", SMALL_GUEST, MEMORY_MIB, VIRTIO)
    backend = f"memory-backend-file,id=ram0,size={MEMORY_MIB}M,share=on,mem-path={directory}/memory"
    arguments = ("-object", backend, *VIRTIO)
    return Host(binary, "pc,memory-backend=ram0", SMALL_GUEST, MEMORY_MIB, arguments)


async def prepare(peer: PeerProcess, *, has_mode: bool = True, ignore_shared: bool) -> None:
    """Set what both ends have to have."""
    await peer.set_capabilities({"events": True, "x-ignore-shared": ignore_shared})
    if has_mode:
        await peer.set_parameters({"mode": "cpr-reboot"})


async def load(peer: PeerProcess, uri: str) -> None:
    """Take a guest."""
    await peer.execute("migrate-incoming", {"uri": uri})


@pytest.mark.parametrize(
    ("version", "is_shared"),
    [
        pytest.param("7.2", True, marks=pytest.mark.matrix),
        pytest.param("10.0", True, marks=pytest.mark.matrix),
        ("11.1", True),
        pytest.param("11.1", False, marks=pytest.mark.matrix),
    ],
)
async def test_from_file_to_file(
    version: str, is_shared: bool, tmp_path: Path, closing: list[object]
) -> None:
    where = host(version, tmp_path, is_shared=is_shared)
    has_mode = version != "7.2"
    first, second = tmp_path / "first", tmp_path / "second"
    source = await where.start("QEMU A")
    closing.append(source)
    await source.wait_serial(4)
    await prepare(source, has_mode=has_mode, ignore_shared=is_shared)
    to = f"file:{first}" if has_mode else f"exec:cat > {first}"
    await source.execute("migrate", {"uri": to})
    await source.wait_migration("completed")
    before = source.serial
    digest = await memory_digest(source, where)
    await source.close()

    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    await prepare(daemon, ignore_shared=is_shared)
    await load(daemon, f"file:{first}")
    await daemon.wait_migration("completed")
    if is_shared:
        assert first.stat().st_size < 1 << 20
        await daemon.set_capabilities({"x-ignore-shared": False})
        with pytest.raises(QMPError, match=r"RAM block 'ram0' is in a file .* x-ignore-shared on"):
            await daemon.execute("migrate", {"uri": f"file:{second}"})
        await daemon.set_capabilities({"x-ignore-shared": True})
    await daemon.execute("migrate", {"uri": f"file:{second}"})
    info = await daemon.wait_migration("completed")
    if is_shared:
        ram = info["ram"]
        assert isinstance(ram, dict)
        assert ram["normal"] < ALL_PAGES // 16

    destination = await where.start("QEMU B", incoming="defer", paused=True)
    closing.append(destination)
    await prepare(destination, has_mode=has_mode, ignore_shared=is_shared)
    await load(destination, f"file:{second}" if has_mode else f"exec:cat {second}")
    await destination.wait_migration("completed")
    assert await memory_digest(destination, where) == digest
    await destination.execute("cont")
    await check_runs_on(before, destination, where)


@pytest.mark.matrix
async def test_both_ends_have_to_ignore_what_is_shared(
    tmp_path: Path, closing: list[object]
) -> None:
    where = host("11.1", tmp_path, is_shared=True)
    source = await where.start("QEMU A", paused=True)
    closing.append(source)
    for source_ignores in (True, False):
        await prepare(source, ignore_shared=source_ignores)
        await source.execute("migrate", {"uri": f"file:{tmp_path}/state"})
        await source.wait_migration("completed")
        await source.wait_run_state("postmigrate")
        await source.execute("cont")
        await source.execute("stop")
        daemon = await DaemonProcess.start(incoming="defer")
        closing.append(daemon)
        await prepare(daemon, ignore_shared=not source_ignores)
        await daemon.execute(
            "migrate-incoming", {"uri": f"file:{tmp_path}/state", "exit-on-error": False}
        )
        await daemon.wait_migration("failed")
        here, there = ("off", "on") if source_ignores else ("on", "off")
        text = f"Capability x-ignore-shared is {here}, but received capability is {there}"
        assert text in str((await daemon.query_migrate())["error-desc"])


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_workload_through_a_file(tmp_path: Path, mapped: bool) -> None:
    here, there = DirtierProcess(tmp_path, "here"), DirtierProcess(tmp_path, "there")
    uri = f"file:{tmp_path}/state"
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(
            await DaemonProcess.start(arguments=here.daemon_arguments)
        )
        await stack.enter_async_context(here)
        await here.wait_passes(1)
        await prepare(source, ignore_shared=False)
        await source.set_capabilities({"mapped-ram": mapped})
        await source.execute("migrate", {"uri": uri})
        await source.wait_migration("completed")
        assert [name for name in names(source) if name != "MIGRATION_PASS"] == IN_ORDER
        last = here.progress()
        destination = await stack.enter_async_context(
            await DaemonProcess.start(incoming="defer", arguments=there.daemon_arguments)
        )
        await stack.enter_async_context(there)
        await prepare(destination, ignore_shared=False)
        await destination.set_capabilities({"mapped-ram": mapped})
        await load(destination, uri)
        await destination.wait_run_state("running")
        await goes_on(there, last)
        assert here.progress() == last

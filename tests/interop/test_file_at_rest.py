"""A guest at rest is QEMU's own file, in both directions, whichever release it came from."""

import asyncio
import json
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest, check_run
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.releases import qemu_binary

pytestmark = pytest.mark.interop

GUEST = BootGuest(counted_pages=256, pages_per_s=20_000, filled_pages=512, fill_step_pages=2)
DEVICES = ("virtio-rng-pci", "VGA")
WITH_MAPPED_RAM = ["10.0", "11.1"]


async def start_qemu(binary: str, machine: str, name: str, incoming: str | None) -> QemuProcess:
    return await QemuProcess.start(
        binary, machine=machine, guest=GUEST, devices=DEVICES, name=name, incoming=incoming
    )


async def start_daemon(path: Path, *arguments: str, incoming: str | None = None) -> DaemonProcess:
    return await DaemonProcess.start(
        incoming=incoming, arguments=("-name", "vm1", "-ram-dir", str(path), *arguments)
    )


async def park(source: QemuProcess, daemon: DaemonProcess) -> None:
    await source.wait_serial(3)
    await source.migrate(await daemon.listening_uri())
    await source.wait_migration()
    await daemon.wait_run_state("paused")


async def check_goes_on(target: QemuProcess, letters_before: str) -> None:
    await target.wait_run_state("running")
    await target.wait_serial(3)
    await target.execute("stop")
    memory = await target.pmemsave(GUEST.counted_address, GUEST.counted_bytes)
    assert check_run(letters_before + target.serial, memory).passes > 4


async def load_file(target: QemuProcess, path: Path) -> None:
    await target.set_capabilities({"events": True, "mapped-ram": True})
    await target.execute("migrate-incoming", {"uri": f"file:{path}"})
    await target.wait_migration()


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("version", WITH_MAPPED_RAM)
async def test_qemu_loads_the_file_of_a_parked_guest(
    version: str, machine: str, tmp_path: Path
) -> None:
    binary = qemu_binary(version)
    async with await start_qemu(binary, machine, "A", None) as source:
        async with await start_daemon(tmp_path, incoming="tcp:127.0.0.1:0") as daemon:
            await park(source, daemon)
            filled = await source.pmemsave(GUEST.filled_address, 4 << 20)
            await daemon.kill()
        async with await start_qemu(binary, machine, "B", "defer") as target:
            await load_file(target, tmp_path / "vm1.mapped-ram")
            await check_goes_on(target, source.serial)
            assert await target.pmemsave(GUEST.filled_address, 4 << 20) == filled


@pytest.mark.parametrize("version", WITH_MAPPED_RAM)
async def test_the_guest_of_an_older_qemu_loads_in_a_newer_one(
    version: str, tmp_path: Path
) -> None:
    """7.2 cannot write such a file itself."""
    older, newer = qemu_binary("7.2"), qemu_binary(version)
    machine = "pc-q35-7.2"
    async with await start_qemu(older, machine, "A", None) as source:
        async with await start_daemon(tmp_path, incoming="tcp:127.0.0.1:0") as daemon:
            await park(source, daemon)
        async with await start_qemu(newer, machine, "B", "defer") as target:
            await load_file(target, tmp_path / "vm1.mapped-ram")
            await check_goes_on(target, source.serial)


@pytest.mark.parametrize("multifd", [False, True], ids=["single", "multifd"])
@pytest.mark.parametrize("version", WITH_MAPPED_RAM)
async def test_a_file_that_qemu_wrote_is_offered_and_goes_on_elsewhere(
    version: str, multifd: bool, tmp_path: Path
) -> None:
    binary = qemu_binary(version)
    async with await start_qemu(binary, "q35", "A", None) as source:
        await source.wait_serial(3)
        capabilities = {"events": True, "mapped-ram": True, "multifd": multifd}
        await source.set_capabilities(capabilities)
        await source.execute("migrate", {"uri": f"file:{tmp_path}/vm1.mapped-ram"})
        await source.wait_migration()
        async with (
            await start_daemon(tmp_path) as daemon,
            await start_qemu(binary, "q35", "B", "tcp:127.0.0.1:0") as target,
        ):
            assert await daemon.run_state() == "paused"
            await daemon.set_capabilities({"events": True, "return-path": True})
            await daemon.execute("migrate", {"uri": await target.listening_uri()})
            await daemon.wait_migration()
            await check_goes_on(target, source.serial)
            assert await daemon.run_state() == "postmigrate"
    assert json.loads((tmp_path / "vm1.json").read_text())["owner"] == "handed-over"


async def test_the_chosen_run_state_outlives_the_daemon(tmp_path: Path) -> None:
    binary = qemu_binary()
    async with await start_qemu(binary, "pc", "A", None) as source:
        async with await start_daemon(tmp_path, incoming="tcp:127.0.0.1:0") as daemon:
            await park(source, daemon)
            await daemon.execute("stop")
            await daemon.quit()
        async with (
            await start_daemon(tmp_path) as daemon,
            await start_qemu(binary, "pc", "B", "tcp:127.0.0.1:0") as target,
        ):
            await daemon.set_capabilities({"return-path": True})
            await daemon.execute("migrate", {"uri": await target.listening_uri()})
            await daemon.wait_migration()
            await target.wait_run_state("paused")
            await target.execute("cont")
            await check_goes_on(target, source.serial)


async def test_a_daemon_killed_in_the_switchover_keeps_the_guest_until_it_is_taken_back(
    tmp_path: Path,
) -> None:
    binary = qemu_binary()
    silent = await asyncio.start_server(_swallow, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with await start_qemu(binary, "pc", "A", None) as source:
        async with await start_daemon(tmp_path, incoming="tcp:127.0.0.1:0") as daemon:
            await park(source, daemon)
            await daemon.set_capabilities({"return-path": True})
            await daemon.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
            await daemon.wait_migration("device")
            await daemon.kill()
        silent.close()
        assert json.loads((tmp_path / "vm1.json").read_text())["owner"] == "handing-over"
        async with (
            await start_daemon(tmp_path) as daemon,
            await start_qemu(binary, "pc", "B", "tcp:127.0.0.1:0") as target,
        ):
            assert await daemon.run_state() == "postmigrate"
            uri = await target.listening_uri()
            with pytest.raises(Exception, match="paused due to previous migration"):
                await daemon.execute("migrate", {"uri": uri})
            await daemon.execute("cont")
            await daemon.set_capabilities({"return-path": True})
            await daemon.execute("migrate", {"uri": uri})
            await daemon.wait_migration()
            await check_goes_on(target, source.serial)


async def test_the_next_guest_takes_the_place_of_one_that_was_handed_over(tmp_path: Path) -> None:
    binary = qemu_binary()
    for machine in ("pc", "q35"):
        async with (
            await start_qemu(binary, machine, "A", None) as source,
            await start_daemon(tmp_path, incoming="tcp:127.0.0.1:0") as daemon,
            await start_qemu(binary, machine, "B", "tcp:127.0.0.1:0") as target,
        ):
            await park(source, daemon)
            await daemon.set_capabilities({"return-path": True})
            await daemon.execute("migrate", {"uri": await target.listening_uri()})
            await daemon.wait_migration()
            await check_goes_on(target, source.serial)
    assert json.loads((tmp_path / "vm1.json").read_text())["owner"] == "handed-over"


async def _swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A destination that takes everything and never answers."""
    while await reader.read(1 << 16):
        pass
    writer.close()

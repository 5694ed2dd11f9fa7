"""libvirt's save images, both ways: ``virsh save`` → migrationd, migrationd → ``virsh restore``."""

import asyncio
import contextlib
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest, check_run, count_passes
from migrationd.ctl.convert_file import Conversion, convert
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu
from migrationd.ctl.verify_file import verify
from migrationd.store.container import open_file, read_container
from tests.support.deadline import until

pytestmark = pytest.mark.interop

GUEST = BootGuest(counted_pages=256, filled_pages=512, pages_per_s=20_000)
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <loader readonly='yes' type='rom'>{rom}</loader>
  </os>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{serial}' append='on'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@dataclass
class Domain:
    """A running domain of libvirt and the directory of its files."""

    name: str
    directory: Path

    @property
    def serial(self) -> str:
        path = self.directory / "serial.txt"
        return path.read_text() if path.exists() else ""

    async def runs_on(self) -> None:
        letters = len(self.serial)
        await until(lambda: len(self.serial) > letters + 2, "the domain counts on")


async def virsh(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "virsh", "-q", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"virsh {' '.join(arguments)}: {output.decode().strip()}")
    return output.decode()


@pytest.fixture
async def domain() -> AsyncIterator[Domain]:
    if shutil.which("virsh") is None:
        pytest.skip("libvirt is missing (Debian: libvirt-daemon-system libvirt-clients)")
    try:
        async with asyncio.timeout(30):
            await virsh("version")
    except (RuntimeError, TimeoutError) as error:
        pytest.skip(f"libvirt does not run here (virtlogd -d; libvirtd -d): {error}")
    # Not below pytest's directory: QEMU may run as another user.
    directory = Path(tempfile.mkdtemp(prefix="migrationd-libvirt-"))
    directory.chmod(0o755)
    name = f"migrationd-{uuid.uuid4().hex[:8]}"
    emulator = find_qemu("7.2") or find_qemu()
    xml = directory / "domain.xml"
    xml.write_text(
        DOMAIN.format(
            name=name,
            machine="pc",
            rom=GUEST.write_image(directory),
            emulator=emulator,
            serial=directory / "serial.txt",
        )
    )
    try:
        await virsh("create", str(xml))
        found = Domain(name, directory)
        await until(lambda: len(found.serial) > 3, "the domain runs")
        yield found
    finally:
        with contextlib.suppress(RuntimeError):  # it was saved
            await virsh("destroy", name)
        shutil.rmtree(directory)


async def test_a_saved_domain_is_loaded_and_moved_on(domain: Domain) -> None:
    image = domain.directory / "saved.img"
    await virsh("save", domain.name, str(image))
    before = domain.serial
    assert [f for f in verify(image) if f.level == "error"] == []
    fd = open_file(image)
    position = read_container(fd, str(image)).position
    async with (
        await DaemonProcess.start(incoming=f"file:{image},offset={position}") as daemon,
        await QemuProcess.start(
            find_qemu("7.2") or find_qemu(), memory_mib=32, guest=GUEST, incoming="tcp:127.0.0.1:0"
        ) as target,
    ):
        await daemon.wait_run_state("paused")
        await daemon.execute("cont")
        await daemon.set_capabilities({"return-path": True})
        await daemon.execute("migrate", {"uri": await target.listening_uri()})
        await daemon.wait_migration()
        await target.wait_run_state("running")
        await target.wait_serial(3)
        await target.execute("stop")
        memory = await target.pmemsave(GUEST.counted_address, GUEST.counted_bytes)
        assert check_run(before + target.serial, memory).passes > 5


async def test_a_parked_guest_is_restored_by_virsh(domain: Domain) -> None:
    """The domain's memory goes through migrationd's own file and comes back as an image."""
    image = domain.directory / "saved.img"
    await virsh("save", domain.name, str(image))
    before = domain.serial
    ram = domain.directory / "ram"
    ram.mkdir()
    convert(image, ram / "vm1.mapped-ram", Conversion("mapped-ram"))
    arguments = ("-name", "vm1", "-ram-dir", str(ram), "-keep")
    async with await DaemonProcess.start(arguments=arguments) as daemon:
        assert await daemon.run_state() == "paused"
        await daemon.execute("migrate", {"uri": f"file:{ram}/stream"})
        await daemon.wait_migration()
    again = domain.directory / "again.img"
    convert(ram / "stream", again, Conversion("libvirt", domain=image))
    image.unlink()
    await virsh("restore", str(again))
    assert (await virsh("domstate", domain.name)).strip() == "running"
    await domain.runs_on()
    await virsh("suspend", domain.name)
    assert domain.serial.startswith(before)
    assert count_passes(domain.serial) > len(before)

"""mapped-ram files by ``migrate`` and ``migrate-incoming``, exchanged with QEMU both ways."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.moves import Host, check_runs_on, memory_digest
from tests.support.releases import qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

VERSIONS = ("10.0", "11.1")
TABLE = "mapped-ram files"


@dataclass(frozen=True)
class Way:
    """How a file is written and read."""

    name: str
    multifd: bool = False
    direct_io: bool = False
    offset: int = 0

    def uri(self, path: Path) -> str:
        return f"file:{path},offset={self.offset:#x}" if self.offset else f"file:{path}"


WAYS = (
    Way("single"),
    Way("multifd", multifd=True),
    Way("direct-io", multifd=True, direct_io=True),
    Way("offset", offset=0x123000),
)


def host_of(version: str) -> Host:
    return Host(qemu_binary(version))


async def prepare(peer: PeerProcess, way: Way) -> None:
    capabilities = {
        "events": True,
        "mapped-ram": True,
        "return-path": False,
        "multifd": way.multifd,
    }
    await peer.set_capabilities(capabilities)
    await peer.set_parameters(
        {"direct-io": way.direct_io, "max-bandwidth": 0, "multifd-channels": 3}
    )


async def write(peer: PeerProcess, way: Way, path: Path) -> None:
    await prepare(peer, way)
    await peer.execute("migrate", {"uri": way.uri(path)})
    await peer.wait_migration()


async def read(peer: PeerProcess, way: Way, path: Path) -> None:
    await prepare(peer, way)
    await peer.execute("migrate-incoming", {"uri": way.uri(path)})
    await peer.wait_migration()


async def stopped_source(host: Host, closing: list[object]) -> QemuProcess:
    source = await host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    await source.execute("stop")
    return source


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "ram_dir", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["mapped", "ram-dir"]
)
async def test_from_qemu_through_migrationd_to_qemu(
    version: str,
    way: Way,
    ram_dir: bool,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    host = host_of(version)
    source = await stopped_source(host, closing)
    first, second = tmp_path / "by-qemu", tmp_path / "by-migrationd"
    await write(source, way, first)
    digest = await memory_digest(source, host)

    arguments = ("-name", "vm1", "-ram-dir", str(tmp_path / "ram")) if ram_dir else ()
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await read(daemon, way, first)
    await daemon.wait_run_state("paused")
    if ram_dir:
        # The guest has a file of its own now.
        first.unlink()
    await write(daemon, way, second)
    assert await daemon.run_state() == "postmigrate"

    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await read(target, way, second)
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    await check_runs_on(source.serial, target, host)
    sizes = [os.stat(path).st_blocks >> 11 for path in (first, second) if path.exists()]
    kept = "its own file" if ram_dir else "QEMU's file"
    row = (version, way.name, kept, "yes", ", ".join(map(str, sizes)))
    add_row(request.config, TABLE, row, head=("QEMU", "way", "held in", "RAM equal", "MiB on disk"))


async def pass_fd(peer: PeerProcess, fd: int) -> int:
    """Add a descriptor to a set of its own; returns the set's number."""
    peer.qmp.send_fd_scm(fd)
    added = await peer.execute("add-fd")
    os.close(fd)
    assert isinstance(added, dict)
    return int(added["fdset-id"])


@pytest.mark.parametrize("direct_io", [False, True], ids=["cached", "direct-io"])
async def test_descriptor_sets_both_ways(
    direct_io: bool, tmp_path: Path, closing: list[object]
) -> None:
    """As a management program does it: nobody opens a file by its name."""
    host = host_of("11.1")
    source = await stopped_source(host, closing)
    first, second = tmp_path / "by-qemu", tmp_path / "by-migrationd"
    way = Way("fdset", offset=0x1000)
    await write(source, way, first)
    digest = await memory_digest(source, host)
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    number = await pass_fd(daemon, os.open(first, os.O_RDONLY))
    first.unlink()
    await prepare(daemon, way)
    await daemon.set_parameters({"direct-io": direct_io})
    await daemon.execute("migrate-incoming", {"uri": f"file:/dev/fdset/{number},offset=0x1000"})
    await daemon.wait_migration()
    number = await pass_fd(daemon, os.open(second, os.O_WRONLY | os.O_CREAT))
    await daemon.execute("migrate", {"uri": f"file:/dev/fdset/{number},offset=0x1000"})
    await daemon.wait_migration()

    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await prepare(target, way)
    number = await pass_fd(target, os.open(second, os.O_RDONLY))
    await target.execute("migrate-incoming", {"uri": f"file:/dev/fdset/{number},offset=0x1000"})
    await target.wait_migration()
    assert await memory_digest(target, host) == digest


@pytest.fixture
def reflink_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares blocks between files."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("mkfs.xfs is missing (Debian: xfsprogs)")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted as root, with loop devices")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def used_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


async def test_a_guest_at_rest_is_saved_and_taken_by_reflink(
    reflink_disk: Path, tmp_path: Path, closing: list[object]
) -> None:
    host = host_of("11.1")
    source = await stopped_source(host, closing)
    first, second = reflink_disk / "by-qemu", reflink_disk / "by-migrationd"
    await write(source, WAYS[0], first)
    digest = await memory_digest(source, host)
    os.sync()
    before = used_bytes(reflink_disk)
    arguments = ("-name", "vm1", "-ram-dir", str(reflink_disk))
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await read(daemon, WAYS[0], first)
    await write(daemon, WAYS[0], second)
    os.sync()
    # Two more guests of 6 MiB take the room of their heads and ends.
    assert used_bytes(reflink_disk) - before < 2 << 20
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await read(target, WAYS[0], second)
    assert await memory_digest(target, host) == digest
    # The loop device goes before the mount does.
    await daemon.close()
    await target.close()

"""mapped-ram files by ``migrate`` and ``migrate-incoming``, exchanged with QEMU both ways."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu
from migrationd.migration.capabilities import NOT_BUILT
from tests.support.moves import Host, check_runs_on, memory_digest
from tests.support.results import TABLES, add_row

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
    binary = find_qemu(version)
    if binary is None:
        pytest.skip(f"QEMU {version} is missing: tests/support/install-qemus")
    return Host(binary)


async def prepare(peer: PeerProcess, way: Way, *, qemu: bool) -> None:
    capabilities = {"events": True, "mapped-ram": True, "return-path": False}
    if "multifd" not in NOT_BUILT or qemu:
        capabilities["multifd"] = way.multifd
    await peer.set_capabilities(capabilities)
    await peer.set_parameters(
        {"direct-io": way.direct_io, "max-bandwidth": 0, "multifd-channels": 3}
    )


async def write(peer: PeerProcess, way: Way, path: Path, *, qemu: bool) -> None:
    await prepare(peer, way, qemu=qemu)
    await peer.execute("migrate", {"uri": way.uri(path)})
    await peer.wait_migration()


async def read(peer: PeerProcess, way: Way, path: Path, *, qemu: bool) -> None:
    await prepare(peer, way, qemu=qemu)
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
    await write(source, way, first, qemu=True)
    digest = await memory_digest(source, host)

    arguments = ("-name", "vm1", "-ram-dir", str(tmp_path / "ram")) if ram_dir else ()
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await read(daemon, way, first, qemu=False)
    await daemon.wait_run_state("paused")
    if ram_dir:
        # The guest has a file of its own now.
        first.unlink()
    await write(daemon, way, second, qemu=False)
    assert await daemon.run_state() == "postmigrate"

    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await read(target, way, second, qemu=True)
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    await check_runs_on(source.serial, target, host)
    sizes = [os.stat(path).st_blocks >> 11 for path in (first, second) if path.exists()]
    kept = "its own file" if ram_dir else "QEMU's file"
    if TABLE not in request.config.stash.get(TABLES, {}):
        add_row(request.config, TABLE, ("QEMU", "way", "held in", "RAM equal", "MiB on disk"))
    row = (version, way.name, kept, "yes", ", ".join(map(str, sizes)))
    add_row(request.config, TABLE, row)

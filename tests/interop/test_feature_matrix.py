"""Each way to carry RAM, with each QEMU, in each direction: RAM equality, or why there is none.

``pytest tests/interop/test_feature_matrix.py -m matrix`` prints the table. In each cell one move
is made in that way, the other one plainly: QEMU -> migrationd for ``in``, migrationd -> QEMU for
``out``; the guest's RAM has to be the same at the end.
"""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu
from tests.interop.test_dirty_bitmaps import bitmaps, host_with_disk, make_bitmaps
from tests.interop.test_tls import objects
from tests.support.certificates import make_directory
from tests.support.deadline import until
from tests.support.moves import Host, check_runs_on, memory_digest, source_uri
from tests.support.releases import RELEASES
from tests.support.results import add_row
from tests.support.starting import start_both

pytestmark = [pytest.mark.interop, pytest.mark.matrix]

TABLE = "RAM by feature, QEMU and direction (in: QEMU -> migrationd, out: migrationd -> QEMU)"
DIRECTIONS = ("in", "out")
EQUAL = "equal"
NO_MAPPED_RAM = "not in this QEMU (9.0)"
RP = {"return-path": True}


@dataclass(frozen=True)
class Feature:
    """A way to carry RAM.

    Attributes:
        name: Of the row.
        capabilities: Of both ends.
        parameters: Of both ends.
        scheme: Of the URI.
        absent: By version and direction (``11.1``, ``out`` or ``7.2 in``) why it cannot be.
    """

    name: str
    capabilities: dict[str, bool] = field(default_factory=lambda: RP)
    parameters: dict[str, object] = field(default_factory=dict)
    scheme: str = "tcp"
    absent: dict[str, str] = field(default_factory=dict)

    def missing(self, version: str, direction: str) -> str | None:
        for key in (f"{version} {direction}", version, direction):
            if key in self.absent:
                return self.absent[key]
        return None


PLAIN = Feature("plain")
FILE = {"mapped-ram": True}
NO_COMPRESS = dict.fromkeys(("10.0", "11.1"), "not in this QEMU (until 9.0)")
FEATURES = (
    PLAIN,
    *(
        Feature(
            f"multifd {method}, {channels}",
            {"multifd": True, **RP},
            {"multifd-channels": channels, "multifd-compression": method},
        )
        for method in ("none", "zlib", "zstd")
        for channels in (1, 2, 8)
    ),
    Feature(
        "xbzrle",
        {"xbzrle": True, **RP},
        absent={"out": "a guest at rest: nothing goes twice"},
    ),
    Feature("compress", {"compress": True, **RP}, absent=NO_COMPRESS),
    Feature("mapped-ram", FILE, scheme="file", absent={"7.2": NO_MAPPED_RAM}),
    Feature(
        "mapped-ram, multifd",
        FILE | {"multifd": True},
        {"multifd-channels": 3},
        scheme="file",
        absent={"7.2": NO_MAPPED_RAM},
    ),
    Feature(
        "direct-io",
        FILE | {"multifd": True},
        {"multifd-channels": 3, "direct-io": True},
        scheme="file",
        absent={"7.2": NO_MAPPED_RAM},
    ),
    Feature("TLS x509"),
    Feature("TLS psk"),
    Feature("dirty-bitmaps", {"dirty-bitmaps": True, **RP}, scheme="unix"),
)

CELLS: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make a table of all cells at the end."""
    CELLS.clear()
    yield
    columns = [(version, direction) for version in RELEASES for direction in DIRECTIONS]
    add_row(request.config, TABLE, ("feature", *(" ".join(column) for column in columns)))
    for feature in FEATURES:
        cells = [CELLS.get((feature.name, *column), "-") for column in columns]
        if any(cell != "-" for cell in cells):
            add_row(request.config, TABLE, (feature.name, *cells))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
async def test_cell(
    feature: Feature, version: str, direction: str, tmp_path: Path, closing: list[object]
) -> None:
    key = (feature.name, version, direction)
    reason = feature.missing(version, direction)
    binary = find_qemu(version)
    if binary is None:
        reason = "QEMU not installed"
    elif feature.name == "TLS psk" and not getattr(ssl, "HAS_PSK", False):
        reason = "Python 3.13 needed"
    if reason is not None:
        CELLS[key] = reason
        return
    CELLS[key] = "FAILED"
    host, arguments = setting(feature, version, tmp_path)
    if feature.name == "compress" and direction == "out":
        arguments = ("-compress", "1")
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer", arguments=arguments)
    )
    await source.wait_serial(3)
    marked = None
    if feature.name == "dirty-bitmaps":
        await make_bitmaps(source, persistent=False)
        marked = await bitmaps(source)
    if feature.name != "xbzrle":
        await source.execute("stop")
    here, there = (feature, PLAIN) if direction == "in" else (PLAIN, feature)
    if marked is not None:
        here = there = feature
    await move(source, daemon, here, tmp_path / "in")
    digest = await memory_digest(source, host)
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await move(daemon, target, there, tmp_path / "out")
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    if marked is not None:
        assert await bitmaps(target) == marked
    await check_runs_on(source.serial, target, host)
    CELLS[key] = EQUAL


def setting(feature: Feature, version: str, directory: Path) -> tuple[Host, tuple[str, ...]]:
    """How the QEMUs are started, and what the daemon is given."""
    binary = find_qemu(version)
    assert binary is not None
    host = Host(binary)
    arguments: tuple[str, ...] = ()
    match feature.name:
        case "xbzrle":
            host = replace(
                host, guest=BootGuest(counted_pages=1500, filled_pages=1024, pages_per_s=6000)
            )
        case "dirty-bitmaps":
            host = host_with_disk(version, directory)
        case "TLS x509":
            arguments = objects(make_directory(directory / "pki"))
        case "TLS psk":
            (directory / "keys.psk").write_text("qemu:" + "0123456789abcdef" * 4 + "\n")
            arguments = tuple(
                word
                for end in ("server", "client")
                for word in ("-object", f"tls-creds-psk,id={end},dir={directory},endpoint={end}")
            )
    return replace(host, arguments=(*host.arguments, *arguments)), arguments


async def prepare(peer: PeerProcess, feature: Feature, end: str) -> None:
    """Set what a feature needs and nothing else."""
    states = await peer.execute("query-migrate-capabilities")
    assert isinstance(states, list)
    known = {entry["capability"] for entry in states}
    wanted = dict.fromkeys(
        ("multifd", "mapped-ram", "dirty-bitmaps", "xbzrle", "compress", "return-path"), False
    )
    wanted |= feature.capabilities | {"events": True}
    await peer.set_capabilities({name: on for name, on in wanted.items() if name in known})
    parameters: dict[str, object] = {"max-bandwidth": 0, "tls-creds": ""}
    if feature.name.startswith("TLS"):
        parameters |= {"tls-creds": end, "tls-hostname": "localhost" if end == "client" else ""}
    await peer.set_parameters(parameters | feature.parameters)


async def move(
    source: PeerProcess, target: QemuProcess | DaemonProcess, feature: Feature, path: Path
) -> None:
    """Move a guest by a feature; both ends complete."""
    await prepare(target, feature, "server")
    await prepare(source, feature, "client")
    if feature.scheme == "file":
        await source.execute("migrate", {"uri": f"file:{path}"})
        await source.wait_migration("completed")
        await target.execute("migrate-incoming", {"uri": f"file:{path}"})
        await target.wait_migration("completed")
        return
    uri = "tcp:127.0.0.1:0" if feature.scheme == "tcp" else f"unix:{path}"
    await target.execute("migrate-incoming", {"uri": uri})
    if feature.name == "xbzrle" and isinstance(source, QemuProcess):
        await source.set_parameters({"max-bandwidth": 12 << 20, "downtime-limit": 1})
    await source.execute("migrate", {"uri": await source_uri(target, uri)})
    if feature.name == "xbzrle" and isinstance(source, QemuProcess):
        await some_deltas(source)
    await source.wait_migration("completed")
    await target.wait_migration("completed")


async def some_deltas(source: QemuProcess) -> None:
    async def has_some() -> bool:
        cache = (await source.query_migrate()).get("xbzrle-cache", {})
        assert isinstance(cache, dict)
        return bool(cache.get("pages", 0) > 100)

    await until(has_some, "pages as deltas", timeout_s=30)
    await source.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})

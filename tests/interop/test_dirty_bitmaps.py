"""Block dirty bitmaps: QEMU -> migrationd -> QEMU, the same bits marked at the end."""

import os
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from migrationd.codec.constants import (
    BLK_MIG_BLOCK_BYTES,
    BLK_MIG_FLAG_DEVICE_BLOCK,
    BLK_MIG_FLAG_EOS,
)
from migrationd.codec.records import OpaqueSection
from migrationd.codec.stream import StreamDecoder
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.moves import Host, check_runs_on, memory_digest
from tests.support.releases import RELEASES, default_release, qemu_binary
from tests.support.results import add_row
from tests.support.starting import start_both

pytestmark = pytest.mark.interop

TABLE = "dirty bitmaps: QEMU -> migrationd -> QEMU"
DISK_BYTES = 64 << 20
WRITES = ("write 0 64k", "write 1M 4k", "write 40M 512k", "write 67107840 1k")


@dataclass(frozen=True)
class Case:
    """One move in and out.

    Attributes:
        name: What is tried.
        arrives: Capabilities of the first move besides ``dirty-bitmaps``.
        leaves: The same of the second move.
        arguments: Of the daemon.
        persistent: Whether the bitmaps belong to a qcow2 disk that both QEMUs open in turn.
        stopped: Whether the guest stands still from before the move on.
        since: First QEMU that can do it.
        is_default: Whether it belongs to the default run.
    """

    name: str
    arrives: dict[str, bool] = field(default_factory=dict)
    leaves: dict[str, bool] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    persistent: bool = False
    stopped: bool = False
    since: str = "7.2"
    is_default: bool = True


RP = {"return-path": True}
RAM = {"postcopy-ram": True, **RP}
FILE = {"mapped-ram": True}
CASES = (
    Case("precopy", RP, RP),
    Case("no way back"),
    Case("persistent on qcow2", RP, RP, persistent=True),
    # QEMU does not look at RAM again when bitmaps alone go by postcopy: what a running guest
    # wrote since its last look stays behind (seen: dirty-sync-count 1, 400 older pages).
    Case("bitmaps alone by postcopy", RP, RP, stopped=True),
    # A few in a hundred moves to a QEMU 7.2 on a busy machine: it closes the connection without a
    # word at the very end, and the guest is kept in postcopy-paused here. Not understood yet.
    Case("postcopy", RAM, RAM, is_default=False),
    Case("multifd", {"multifd": True, **RP}, {"multifd": True, **RP}),
    Case("at rest in a file", RP, RP, arguments=("-name", "g", "-ram-dir", "{tmp}")),
    Case("mapped-ram", FILE, FILE, since="10.0"),
)


def cases() -> list[object]:
    """The default run uses the QEMU on the path; the rest is the full matrix."""
    default = default_release()
    return [
        pytest.param(
            version, case, id=f"{version}-{case.name}",
            marks=[] if version == default and case.is_default else [pytest.mark.matrix],
        )
        for version in RELEASES
        for case in CASES
        if float(version) >= float(case.since)
    ]  # fmt: skip


def host_with_disk(version: str, directory: Path, *, form: str = "raw") -> Host:
    disk = directory / f"disk.{form}"
    if form == "raw":
        disk.touch()
        os.truncate(disk, DISK_BYTES)
    else:
        made = ["qemu-img", "create", "-q", "-f", form, str(disk), str(DISK_BYTES)]
        subprocess.run(made, check=True)
    node = f"driver={form},node-name=disk,file.driver=file,file.filename={disk}"
    # Both QEMUs are there at once, as on two hosts with one storage.
    arguments = ("-blockdev", node, "-device", "virtio-blk-pci,drive=disk,share-rw=on")
    return Host(qemu_binary(version), arguments=arguments)


async def make_bitmaps(qemu: QemuProcess, *, persistent: bool) -> None:
    for name, granularity in (("fine", 4096), ("coarse", 65536), ("empty", 4096)):
        arguments = {"node": "disk", "name": name, "granularity": granularity}
        await qemu.execute("block-dirty-bitmap-add", arguments | {"persistent": persistent})
    await qemu.execute("block-dirty-bitmap-disable", {"node": "disk", "name": "empty"})
    await write_to_disk(qemu)
    await qemu.execute("block-dirty-bitmap-disable", {"node": "disk", "name": "coarse"})


async def write_to_disk(qemu: QemuProcess) -> None:
    for command in WRITES:
        line = f'qemu-io disk "{command}"'
        said = await qemu.execute("human-monitor-command", {"command-line": line})
        assert "error" not in str(said).lower()


async def bitmaps(qemu: QemuProcess) -> dict[str, tuple[object, ...]]:
    """By name everything that makes a bitmap."""
    nodes = await qemu.execute("query-named-block-nodes")
    assert isinstance(nodes, list)
    found: dict[str, tuple[object, ...]] = {}
    for entry in next(node for node in nodes if node["node-name"] == "disk").get(
        "dirty-bitmaps", ()
    ):
        named = {"node": "disk", "name": entry["name"]}
        digest = await qemu.execute("x-debug-block-dirty-bitmap-sha256", named)
        assert isinstance(digest, dict)
        words = ("count", "granularity", "recording", "persistent", "busy")
        found[entry["name"]] = (*(entry[word] for word in words), digest["sha256"])
    return found


async def prepare(peer: PeerProcess, capabilities: dict[str, bool]) -> None:
    every = {"return-path": False, "postcopy-ram": False, "multifd": False}
    if not isinstance(peer, QemuProcess) or capabilities.get("mapped-ram"):
        every["mapped-ram"] = False
    await peer.set_capabilities(every | {"events": True, "dirty-bitmaps": True, **capabilities})


async def move(
    source: PeerProcess, target: PeerProcess, uri: str, capabilities: dict[str, bool], how: str
) -> None:
    """Move a guest; both must end completed."""
    by_postcopy = "postcopy" in how
    await prepare(source, capabilities)
    await prepare(target, capabilities)
    slow = by_postcopy and isinstance(source, QemuProcess)
    await source.set_parameters({"max-bandwidth": 4 << 20 if slow else 0})
    if not uri.startswith("file:"):
        await target.execute("migrate-incoming", {"uri": uri})
    await source.execute("migrate", {"uri": uri})
    if by_postcopy:
        await source.wait_migration("active", "device", "completed")
        await source.execute("migrate-start-postcopy")
        await source.set_parameters({"max-bandwidth": 0})
    await source.wait_migration("completed")
    if uri.startswith("file:"):
        await target.execute("migrate-incoming", {"uri": uri})
    await target.wait_migration("completed")


@pytest.mark.parametrize(("version", "case"), cases())
async def test_move(
    version: str, case: Case, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    host = host_with_disk(version, tmp_path, form="qcow2" if case.persistent else "raw")
    scheme = "file" if "mapped-ram" in case.arrives else "unix"
    source = await host.start("QEMU A")
    closing.append(source)
    arguments = tuple(word.format(tmp=tmp_path) for word in case.arguments)
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await source.wait_serial(3)
    await make_bitmaps(source, persistent=case.persistent)
    before = await bitmaps(source)
    assert len(before) == 3
    assert before["fine"][0] != 0
    if case.stopped:
        await source.execute("stop")

    await move(source, daemon, f"{scheme}:{tmp_path}/in", case.arrives, case.name)
    digest = await memory_digest(source, host)
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await move(daemon, target, f"{scheme}:{tmp_path}/out", case.leaves, case.name)
    if (version, case.name) != ("11.1", "postcopy"):
        # Its stopped source's RAM is not what left: so it is between two QEMU 11.1, too.
        assert await memory_digest(target, host) == digest
    await target.execute("cont")
    assert await bitmaps(target) == before
    await check_runs_on(source.serial, target, host)
    if case.persistent:
        await target.quit()
        shown = subprocess.run(
            ["qemu-img", "info", "-U", str(tmp_path / "disk.qcow2")],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert all(f"name: {name}" in shown for name in before)
    report(request.config, version, case.name, "yes")


def mapping(node: str, alias: str, names: dict[str, str], **persistent: bool) -> object:
    """``block-bitmap-mapping`` of one node, by its name here and its name in the stream."""
    bitmaps = [
        {"name": name, "alias": other}
        | ({"transform": {"persistent": persistent[name]}} if name in persistent else {})
        for name, other in names.items()
    ]
    return [{"node-name": node, "alias": alias, "bitmaps": bitmaps}]


@pytest.mark.parametrize(
    "version",
    ["7.2", *(pytest.param(version, marks=pytest.mark.matrix) for version in RELEASES[1:])],
)
async def test_a_mapping_at_every_end(
    version: str, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Names change on the way in, here, and on the way out; what is not listed stays behind."""
    host = host_with_disk(version, tmp_path, form="qcow2")
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer")
    )
    await source.wait_serial(3)
    await make_bitmaps(source, persistent=False)
    before = await bitmaps(source)
    names = mapping("disk", "wire", {"fine": "1", "coarse": "2", "empty": "3"})
    await source.set_parameters({"block-bitmap-mapping": names})
    names = mapping("here", "wire", {"f": "1", "c": "2"})
    await daemon.set_parameters({"block-bitmap-mapping": names})
    await move(source, daemon, f"unix:{tmp_path}/in", RP, "")
    names = mapping("here", "onward", {"f": "x", "c": "y"}, f=True)
    await daemon.set_parameters({"block-bitmap-mapping": names})
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    names = mapping("disk", "onward", {"fine": "x", "coarse": "y"})
    await target.set_parameters({"block-bitmap-mapping": names})
    await move(daemon, target, f"unix:{tmp_path}/out", RP, "")
    await target.execute("cont")
    after = await bitmaps(target)
    assert after.keys() == {"fine", "coarse"}
    assert after["coarse"] == before["coarse"]
    # Made persistent on the way.
    assert after["fine"] == (*before["fine"][:3], True, *before["fine"][4:])
    report(request.config, version, "block-bitmap-mapping at every end", "yes")


@pytest.mark.parametrize("is_mapped", [True, False], ids=["empty mapping", "capability off"])
async def test_all_stay_behind(tmp_path: Path, closing: list[object], is_mapped: bool) -> None:
    host = host_with_disk("7.2", tmp_path)
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer")
    )
    await source.wait_serial(1)
    await make_bitmaps(source, persistent=False)
    await move(source, daemon, f"unix:{tmp_path}/in", RP, "")
    if is_mapped:
        await daemon.set_parameters({"block-bitmap-mapping": []})
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    leaves = RP if is_mapped else RP | {"dirty-bitmaps": False}
    await move(daemon, target, f"unix:{tmp_path}/out", leaves, "")
    assert await bitmaps(target) == {}


def report(config: pytest.Config, version: str, way: str, outcome: str) -> None:
    add_row(config, TABLE, (version, way, outcome), head=("QEMU", "way", "same bitmaps"))


def disk_chunks(path: Path) -> dict[int, bytes]:
    """What a stream has of the disk ``disk``, by offset."""
    decoder = StreamDecoder()
    decoder.feed(path.read_bytes())
    decoder.feed_eof()
    found = {}
    while (record := decoder.next_record()) is not None:
        if not isinstance(record, OpaqueSection) or record.idstr != "block":
            continue
        body, at = record.body, 0
        while (word := int.from_bytes(body[at : at + 8], "big")) & 0x1FF != BLK_MIG_FLAG_EOS:
            at += 8
            if word & BLK_MIG_FLAG_DEVICE_BLOCK:
                assert body[at : at + 5] == b"\4disk"
                found[word & ~0x1FF] = body[at + 5 : at + 5 + BLK_MIG_BLOCK_BYTES]
                at += 5 + BLK_MIG_BLOCK_BYTES
    return found


@pytest.mark.parametrize("at_rest", [False, True], ids=["in memory", "ram-dir"])
async def test_disk_contents_in_the_stream(
    at_rest: bool, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """QEMU up to 9.0 sends whole disks in ``block`` sections when asked to."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    one, other = (
        replace(
            host_with_disk("7.2", directory),
            arguments=(
                # The section names drives, not nodes.
                *("-drive", f"if=none,id=disk,format=raw,file={directory}/disk.raw"),
                *("-device", "virtio-blk-pci,drive=disk,share-rw=on"),
            ),
        )
        for directory in (here, there)
    )
    source = await one.start("QEMU A")
    closing.append(source)
    arguments = ("-keep", *(("-name", "g", "-ram-dir", str(tmp_path)) if at_rest else ()))
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in", arguments=arguments)
    closing.append(daemon)
    await source.wait_serial(3)
    await write_to_disk(source)
    # A running guest's RAM gets torn now and then, between two QEMU 7.2 as well.
    await source.execute("stop")
    # Without a limit it would send nothing of the disk.
    await source.set_parameters({"max-bandwidth": 1 << 30})
    await source.set_capabilities({"return-path": True})
    await source.execute("migrate", {"uri": f"unix:{tmp_path}/in", "blk": True})
    await source.wait_migration("completed")
    await daemon.wait_migration("completed")
    digest = await memory_digest(source, one)
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/stream"})
    await daemon.wait_migration("completed")
    target = await other.start("QEMU B", incoming=f"unix:{tmp_path}/out", paused=True)
    closing.append(target)
    await daemon.set_capabilities({"return-path": True})
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/out"})
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    assert await memory_digest(target, other) == digest
    await target.execute("cont")
    await check_runs_on(source.serial, target, other)
    await target.quit()
    # Not always all that the source has: QEMU 7.2 leaves a part out now and then.
    sent = disk_chunks(tmp_path / "stream")
    assert any(any(chunk) for chunk in sent.values())
    contents = (there / "disk.raw").read_bytes()
    for at, chunk in sent.items():
        assert contents[at : at + len(chunk)] == chunk
    way = "block migration, at rest in a file" if at_rest else "block migration"
    report(request.config, "7.2", way, "same disk contents")

"""Recorded multifd migrations, fed to the destination connection by connection."""

import asyncio
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.daemon.shelter import MemoryBerth
from migrationd.incoming.berth import IncomingSettings
from migrationd.incoming.driver import IncomingMigration
from migrationd.transport.address import UnixAddress
from migrationd.transport.listen import listen
from tests.conformance.captures import Capture, all_captures

CONNECT_ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0))


def scenarios() -> Iterator[list[Capture]]:
    """The forward connections of each migration with multifd channels, main first."""
    found: dict[str, list[Capture]] = {}
    for capture in all_captures():
        if "multifd" in capture.scenario["capabilities"] and not capture.is_mapped_ram:
            found.setdefault(capture.name.split(".")[0], []).append(capture)
    for files in found.values():
        yield [c for c in files if c.entry["direction"] == "source-to-destination"]


SCENARIOS = list(scenarios())


def test_every_version_and_method_is_there() -> None:
    names = {files[0].name.split(".")[0] for files in SCENARIOS}
    assert len(names) == 15
    for version in ("72", "100", "111"):
        for method in ("none", "zlib", "zstd"):
            assert any(name.startswith(f"{version}-multifd-{method}") for name in names)


@pytest.mark.parametrize("order", CONNECT_ORDERS, ids=["main-first", "main-last"])
@pytest.mark.parametrize("files", SCENARIOS, ids=lambda files: files[0].name.split(".")[0])
async def test_the_ram_is_the_source_s(
    files: list[Capture], order: tuple[int, ...], tmp_path: Path
) -> None:
    assert files[0].scenario["source_status"] == "completed"
    parameters = files[0].scenario.get("parameters") or {}
    settings = IncomingSettings(
        multifd_channels=len(files) - 1,
        multifd_compression=parameters.get("multifd_compression", "none"),
    )
    path = str(tmp_path / "in.sock")
    statuses: list[str] = []
    incoming = IncomingMigration(MemoryBerth(), lambda: settings, statuses.append)
    incoming.begin()
    incoming.listen_on(await listen(UnixAddress(path), lambda _: -1))
    loading = asyncio.create_task(incoming.run())
    sockets = [socket.socket(socket.AF_UNIX) for _ in files]
    try:
        for number in order:
            if number < len(files):
                sockets[number].connect(path)
        senders = [
            asyncio.to_thread(sock.sendall, capture.data())
            for sock, capture in zip(sockets, files, strict=True)
        ]
        async with asyncio.timeout(30):
            await asyncio.gather(*senders)
            for sock in sockets:
                sock.shutdown(socket.SHUT_WR)
            guest = await loading
    finally:
        for sock in sockets:
            sock.close()
    assert incoming.error is None
    assert guest is not None
    assert statuses == ["setup", "active", "completed"]
    oracle = files[0].scenario["ram_oracle"]
    block = next(block for block in guest.ram if block.idstr == oracle["block"])
    content = block.memory.view[: oracle["length"]].tobytes()
    assert hashlib.sha256(content).hexdigest() == oracle["sha256"]
    guest.close()

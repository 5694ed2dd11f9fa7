"""QEMU 7.2's ``compress``: pages that its threads deflate one by one.

Where the guest runs, the stream of QEMU 7.2 itself lacks late writes now and then (a guest that
it moves to another QEMU 7.2 is torn as often). So a running guest's stream is recorded and given
to both: the same bytes have to make the same guest here as in QEMU.
"""

import asyncio
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from migrationd.ctl.qemu_process import QemuProcess
from tests.support.moves import Host, check_runs_on, memory_digest, send
from tests.support.parked_file import holder
from tests.support.releases import qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "compress, with QEMU 7.2"


@pytest.fixture
def host() -> Host:
    return Host(qemu_binary("7.2"))


async def record(
    host: Host, path: Path, closing: list[object], *, stopped: bool, threads: int = 4
) -> QemuProcess:
    """A migration stream of a guest with compressed pages, in a file."""
    source = await host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    if stopped:
        await source.execute("stop")
    await source.set_capabilities({"compress": True, "events": True})
    await source.set_parameters({"max-bandwidth": 0, "compress-threads": threads})
    ended = asyncio.Event()
    with path.open("wb") as file:

        async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 20):
                file.write(data)
            writer.close()
            ended.set()

        server = await asyncio.start_unix_server(keep, path.with_suffix(".sock"))
        async with server:
            await source.execute("migrate", {"uri": f"unix:{path.with_suffix('.sock')}"})
            await source.wait_migration("completed")
            await asyncio.wait_for(ended.wait(), 30)
    compression = (await source.query_migrate())["compression"]
    assert isinstance(compression, dict)
    assert compression["pages"] > 1000
    return source


async def loaded_by_qemu(host: Host, path: Path, closing: list[object]) -> str:
    """Digest of the RAM that QEMU makes of a stream."""
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await target.set_capabilities({"compress": True})
    await target.execute("migrate-incoming", {"uri": f"exec:cat {path}"})
    await target.wait_migration("completed")
    return await memory_digest(target, host)


async def passed_on(
    host: Host, path: Path, directory: Path, closing: list[object]
) -> tuple[str, QemuProcess]:
    """The same through migrationd, and the QEMU that has it."""
    daemon = await holder(path, closing)
    uri = f"unix:{directory}/out.sock"
    target = await host.start("QEMU C", incoming=uri, paused=True)
    closing.append(target)
    await send(daemon, target, uri, return_path=True)
    return await memory_digest(target, host), target


async def test_a_stopped_guest_is_whole(
    host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    source = await record(host, tmp_path / "stream", closing, stopped=True)
    digest, target = await passed_on(host, tmp_path / "stream", tmp_path, closing)
    assert digest == await memory_digest(source, host)
    await target.execute("cont")
    passes = await check_runs_on(source.serial, target, host)
    report(request.config, "stopped", "RAM equal to the source's", f"goes on, {passes} passes")


@pytest.mark.parametrize(
    "attempt", [0, *(pytest.param(n, marks=pytest.mark.matrix) for n in range(1, 8))]
)
async def test_the_same_bytes_make_the_same_guest(
    attempt: int, host: Host, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    source = await record(host, tmp_path / "stream", closing, stopped=False, threads=1 + attempt)
    digest, _ = await passed_on(host, tmp_path / "stream", tmp_path, closing)
    assert digest == await loaded_by_qemu(host, tmp_path / "stream", closing)
    is_source = digest == await memory_digest(source, host)
    lacks = "RAM equal to the source's" if is_source else "QEMU's own stream lacks late writes"
    report(request.config, f"running, {1 + attempt} threads", "RAM equal to QEMU's load", lacks)


def report(config: pytest.Config, *row: str) -> None:
    add_row(config, TABLE, row, head=("guest", "result", "source"))


async def test_out_to_a_qemu_that_takes_it(
    host: Host, parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    path, digest, serial = parked_file
    daemon = await holder(path, closing, arguments=["-compress", "6"])
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await target.set_capabilities({"compress": True})
    uri = f"unix:{tmp_path}/out.sock"
    await target.execute("migrate-incoming", {"uri": uri})
    await daemon.set_capabilities({"multifd": True})
    with pytest.raises(ExecuteError, match="'multifd' cannot be combined with -compress"):
        await daemon.execute("migrate", {"uri": uri})
    await daemon.set_capabilities({"multifd": False})
    await send(daemon, target, uri, return_path=True)
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    passes = await check_runs_on(serial, target, host)
    report(request.config, "out of migrationd", "RAM equal", f"goes on, {passes} passes")

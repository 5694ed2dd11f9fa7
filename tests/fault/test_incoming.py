"""Bad sources: each costs its own migration, with a typed error, and nothing else."""

import asyncio
import random
import re
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import AT_ONCE_S, until
from tests.support.moves import Host, move_on
from tests.support.results import add_row

pytestmark = pytest.mark.fault

TABLE = "bad streams: what query-migrate says"

HEADER = bytes.fromhex("5145564d 00000003")
RAM_START = bytes.fromhex("01 00000001 03 72616d 00000000 00000004")


def block(name: bytes, length: int) -> bytes:
    return bytes([len(name)]) + name + length.to_bytes(8, "big")


def ram(total: int, *blocks: bytes) -> bytes:
    return HEADER + RAM_START + (total | 4).to_bytes(8, "big") + b"".join(blocks)


EOS = (0x10).to_bytes(8, "big")
FOOTER = bytes.fromhex("7e 00000001")
ONE_BLOCK = ram(0x1000, block(b"pc.ram", 0x1000)) + EOS + FOOTER
PART = bytes.fromhex("02 00000001")

STREAMS: dict[str, tuple[bytes, str]] = {
    "wrong magic": (b"GET / HTTP/1.1\r\n\r\n", "Not a migration stream"),
    "version 2": (bytes.fromhex("5145564d 00000002"), "version 2"),
    "nothing": (b"", "ended"),
    "unknown element": (HEADER + b"\x55" * 16, "element"),
    "unknown command": (HEADER + bytes.fromhex("08 0063 0000"), "command"),
    "RAM version 3": (
        HEADER + bytes.fromhex("01 00000001 03 72616d 00000000 00000003") + EOS,
        "version 3",
    ),
    "exceeds -ram-limit": (ram(1 << 40, block(b"pc.ram", 1 << 40)), "limit"),
    "blocks exceed the total": (ram(0x1000, block(b"pc.ram", 0x2000)), "total"),
    "the same block twice": (ram(0x2000, block(b"a", 0x1000), block(b"a", 0x1000)), "twice"),
    "unknown block": (
        ONE_BLOCK + PART + (0x8).to_bytes(8, "big") + b"\x03foo" + bytes(4096),
        "block",
    ),
    "page outside its block": (
        ONE_BLOCK + PART + (0x7000 | 8).to_bytes(8, "big") + b"\x06pc.ram" + bytes(4096),
        "outside",
    ),
    "CONTINUE before any block": (
        ONE_BLOCK + PART + (0x28).to_bytes(8, "big") + bytes(4096),
        "CONTINUE",
    ),
    "RAM flags out of range": (ONE_BLOCK + PART + (0x800).to_bytes(8, "big"), "flags"),
    "part that never started": (HEADER + bytes.fromhex("02 00000009"), "never started"),
    "wrong footer": (
        ram(0x1000, block(b"a", 0x1000)) + EOS + bytes.fromhex("7e 00000002"),
        "footer",
    ),
    "duplicate ram section": (
        ONE_BLOCK + RAM_START.replace(b"\0\0\0\1", b"\0\0\0\2", 1),
        "duplicate",
    ),
    "4 GiB VMDESCRIPTION": (ONE_BLOCK + bytes.fromhex("00 06 ffffffff"), "VMDESCRIPTION"),
    "LISTEN without a return path": (HEADER + bytes.fromhex("08 0004 0000"), "return path"),
    "machine name of 4 GiB": (HEADER + bytes.fromhex("07 ffffffff"), "machine"),
    "PING without a return path": (HEADER + bytes.fromhex("08 0002 0004 00000001"), "PING"),
}


def report(config: pytest.Config, name: str, text: str) -> None:
    add_row(config, TABLE, (name, text), head=("stream", "error-desc"))


async def offer(daemon: DaemonProcess, directory: Path, data: bytes) -> dict[str, object]:
    """Send a stream to a waiting daemon; returns its query-migrate afterwards."""
    uri = f"unix:{directory}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    _, writer = await asyncio.open_unix_connection(f"{directory}/in.sock")
    writer.write(data)
    writer.write_eof()
    info = await daemon.wait_migration("failed")
    writer.close()
    return info


@pytest.mark.parametrize(
    ("arguments", "ready_bytes"),
    [(["-ram-limit", "1G"], 0), (["-ram-limit", "1G", "-ram-prealloc", "192M"], (192 + 40) << 20)],
    ids=["memory when it is needed", "memory made ready"],
)
async def test_bad_streams_one_after_the_other_and_then_a_good_one(
    arguments: list[str], ready_bytes: int, parked_file: tuple[Path, str, str], qemu_host: Host,
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    await daemon.wait_resident(ready_bytes)
    before = daemon.resident_bytes
    for name, (data, expected) in STREAMS.items():
        info = await offer(daemon, tmp_path, data)
        text = str(info["error-desc"])
        assert re.search(expected, text), f"{name}: {text}"
        report(request.config, name, text.removeprefix("load of migration failed: "))
        assert await daemon.run_state() == "inmigrate"
    # The monitor says so before it is written, and each is written once.
    await until(
        lambda: daemon.stderr.count("load of migration failed") >= len(STREAMS), "the last line"
    )
    assert daemon.stderr.count("load of migration failed") == len(STREAMS)
    assert daemon.resident_bytes - before < 32 << 20
    path, digest, _ = parked_file
    await daemon.execute("migrate-incoming", {"uri": f"file:{path}"})
    await daemon.wait_migration("completed")
    arrived, qemu = await move_on(daemon, qemu_host, tmp_path)
    closing.append(qemu)
    assert arrived == digest


async def test_mutated_real_streams(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming="defer", arguments=["-ram-limit", "1G"])
    closing.append(daemon)
    whole = parked_file[0].read_bytes()
    rng = random.Random(11)
    for _ in range(12):
        cut = rng.randrange(len(whole) - 1)
        info = await offer(daemon, tmp_path, whole[:cut])
        assert "position" in str(info["error-desc"])
    assert (await daemon.query("query-status"))["status"] == "inmigrate"


async def test_a_failed_load_ends_the_process_as_qemu_does(
    tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    closing.append(daemon)
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    writer.write(b"garbage!")
    await writer.drain()
    assert await daemon.wait_exit() == 1
    writer.close()
    assert "load of migration failed: Not a migration stream" in daemon.stderr


async def test_source_killed_mid_stream(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    uri = f"unix:{tmp_path}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    source = await qemu_host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(1)
    await source.migrate(uri, max_bandwidth=2 << 20)
    await daemon.wait_migration("active")
    await source.kill()
    info = await daemon.wait_migration("failed")
    assert re.search("ended|closed|reset by peer|Broken pipe", str(info["error-desc"]))


async def test_a_silent_peer_does_not_hold_the_monitor(
    tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    closing.append(daemon)
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    writer.write(HEADER)
    await daemon.wait_migration("active")
    loop = asyncio.get_running_loop()
    slowest = 0.0
    for _ in range(50):
        start = loop.time()
        await daemon.execute("query-status")
        slowest = max(slowest, loop.time() - start)
    assert slowest < AT_ONCE_S
    assert await daemon.quit() == 0
    writer.close()


async def test_a_source_that_never_reads_its_pongs(tmp_path: Path, closing: list[object]) -> None:
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    await daemon.execute(
        "migrate-incoming", {"uri": f"unix:{tmp_path}/in.sock", "exit-on-error": False}
    )
    before = daemon.resident_bytes
    _, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    writer.write(HEADER + bytes.fromhex("08 0001 0000"))
    ping = bytes.fromhex("08 0002 0004 00000001") * 10000

    async def flood() -> None:
        while True:
            writer.write(ping)
            await writer.drain()

    task = asyncio.create_task(flood())
    await until(lambda: not task.done(), "flooding")
    for _ in range(20):
        assert (await daemon.query("query-status"))["status"] == "inmigrate"
    assert daemon.resident_bytes - before < 32 << 20
    task.cancel()
    writer.transport.abort()
    await daemon.wait_migration("failed")

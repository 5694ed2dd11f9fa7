"""Channels that lie, break or do not come: a typed error, and the guest stays where it was."""

import asyncio
import os
import random
import re
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from migrationd.codec.multifd import Hello, PacketEncoder, encode_hello, set_data_bytes
from migrationd.codec.ram_encode import encode_block_list, encode_eos, encode_multifd_flush
from migrationd.codec.records import RamBlockEntry
from migrationd.codec.section import encode_section_footer, encode_section_header
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import qemu_version
from tests.support.channel_cutter import ChannelCutter
from tests.support.deadline import until
from tests.support.moves import Host, memory_digest, move_on, send
from tests.support.parked_file import expect_move, holder
from tests.support.resources import given_back, held
from tests.support.results import add_fault, add_row
from tests.support.starting import Ahead, start_both

pytestmark = pytest.mark.fault

CUT_TABLE = "one of several connections cut at a byte"
PAGE = 4096
PAGES = 1024
BLOCK = "pc.ram"
MULTIFD = {"multifd": True, "events": True}

HEAD = (
    bytes.fromhex("5145564d00000003")
    + encode_section_header(1, 1, "ram", 0, 4)
    + encode_block_list((RamBlockEntry(BLOCK, PAGES * PAGE),))
)
MARK = encode_multifd_flush()
END_OF_START = encode_eos() + encode_section_footer(1)
PART = encode_section_header(2, 1) + MARK + encode_eos() + encode_section_footer(1)
REST = encode_section_header(3, 1) + encode_eos() + encode_section_footer(1) + b"\0"
MAIN = HEAD + MARK + END_OF_START + PART + REST + bytes.fromhex("06000000027b7d")


def sync(number: int) -> bytes:
    return PacketEncoder(PAGE, "none").sync(number)


def packet(pages: list[int], data: bytes | None = None, method: str = "none") -> bytes:
    """A packet of these pages; compressed data comes as it is."""
    header = PacketEncoder(PAGE, method).headers(BLOCK, np.array(pages), 7, is_zero=False)[0]
    if data is not None:
        set_data_bytes(header, len(data))
    return header.tobytes() + (data if data is not None else bytes(len(pages) * PAGE))


def with_offset(offset: int) -> bytes:
    data = bytearray(packet([0]))
    data[320:328] = offset.to_bytes(8, "big")
    return bytes(data)


def zlib_bomb() -> bytes:
    stream = zlib.compressobj(9)
    return stream.compress(bytes(512 << 20)) + stream.flush(zlib.Z_SYNC_FLUSH)


def zstd_bomb() -> bytes:
    return zstd.ZstdCompressor(level=1).compress(
        bytes(1 << 30), mode=zstd.ZstdCompressor.FLUSH_BLOCK
    )


@dataclass
class Case:
    """What a source of two channels sends.

    Attributes:
        expected: What the error says.
        first: Of channel 0, behind its hello.
        second: Of channel 1.
        main: Of the main connection.
        hellos: How the channels introduce themselves.
        method: The destination's ``multifd-compression``.
        keeps_open: Connections stay open behind the last byte.
    """

    expected: str
    first: bytes = sync(1) + sync(2)
    second: bytes = sync(1) + sync(2)
    main: bytes = MAIN
    hellos: tuple[Hello, ...] = (Hello(0, bytes(16)), Hello(1, bytes(16)))
    method: str = "none"
    keeps_open: bool = field(default=True)


def bad(middle: bytes, expected: str, method: str = "none", *, keeps_open: bool = True) -> Case:
    """A channel that says this between its SYNCs."""
    return Case(expected, sync(1) + middle, method=method, keeps_open=keeps_open)


CASES: dict[str, Case] = {
    "channel number out of range": Case(
        "channel id 2 is greater", hellos=(Hello(0, bytes(16)), Hello(2, bytes(16)))
    ),
    "the same channel twice": Case(
        "channel 1 came twice", hellos=(Hello(1, bytes(16)), Hello(1, bytes(16)))
    ),
    "UUIDs that differ": Case(
        "expected uuid", hellos=(Hello(0, bytes(16)), Hello(1, bytes(15) + b"x"))
    ),
    "a channel ends before its SYNC": Case("before its SYNC 2", sync(1), keeps_open=False),
    "ends inside a header": bad(sync(9)[:700], "700 bytes of a header", keeps_open=False),
    "ends inside page data": bad(
        packet([1, 2, 3])[:-100], "12188 of 12288 bytes", keeps_open=False
    ),
    "rubbish": bad(os.urandom(2000), "packet with magic"),
    "offset outside the block": bad(with_offset(PAGES * PAGE), "is not one of the block"),
    "offset of 2^64 - 4096": bad(with_offset((1 << 64) - PAGE), "is not one of the block"),
    "offset inside a page": bad(with_offset(7), "is not one of the block"),
    "unknown block": bad(packet([0]).replace(b"pc.ram", b"pc.rom"), "'pc.rom'"),
    "another compression": bad(packet([0], b"x", "zlib"), "compressed with 'zlib'"),
    "not compressed at all": bad(packet([0]), "compressed with 'none'", "zstd"),
    "zlib rubbish": bad(packet([0], b"rubbish", "zlib"), "zlib data that is wrong", "zlib"),
    "zstd rubbish": bad(packet([0], b"rubbish", "zstd"), "zstd data that is wrong", "zstd"),
    "zlib bomb": bad(packet([0], zlib_bomb(), "zlib"), "more than 4096 bytes", "zlib"),
    "zstd bomb": bad(packet([0], zstd_bomb(), "zstd"), "more than 4096 bytes", "zstd"),
    "device state": bad(
        bytes.fromhex("11223344 00000001 00000040").ljust(1344, b"\0"), "device state"
    ),
    "pages behind the last mark": Case(
        "behind the last mark", sync(1) + sync(2) + packet([5]), main=MAIN
    ),
    "a flush where sections are synchronised": Case(
        "MULTIFD_FLUSH", main=HEAD + END_OF_START + PART
    ),
}


def report(config: pytest.Config, title: str, head: tuple[str, ...], *row: str) -> None:
    add_row(config, title, row, head=head)


async def offer(daemon: DaemonProcess, directory: Path, case: Case) -> dict[str, object]:
    """Play a source to a waiting daemon; returns its query-migrate afterwards."""
    path = f"{directory}/in.sock"
    await daemon.set_parameters({"multifd-channels": 2, "multifd-compression": case.method})
    await daemon.execute("migrate-incoming", {"uri": f"unix:{path}", "exit-on-error": False})
    contents = [case.main]
    for hello, content in zip(case.hellos, (case.first, case.second), strict=True):
        contents.append(encode_hello(hello) + content)
    writers = []
    for content in contents:
        _, writer = await asyncio.open_unix_connection(path)
        writers.append(writer)
        writer.write(content)
    if not case.keeps_open:
        writers[1].write_eof()
    info = await daemon.wait_migration("failed", "completed")
    for writer in writers:
        writer.close()
    return info


async def test_bad_channels_one_after_the_other_and_then_good_ones(
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    daemon = await DaemonProcess.start(incoming="defer", arguments=["-ram-limit", "1G"])
    closing.append(daemon)
    await daemon.set_capabilities(MULTIFD)
    peak_before, idle = 0, held(daemon.pid)
    for name, case in CASES.items():
        info = await offer(daemon, tmp_path, case)
        text = str(info.get("error-desc"))
        assert info["status"] == "failed", name
        assert re.search(case.expected, text), f"{name}: {text}"
        add_fault(request.config, name, text, "waits; a good source is taken")
        assert await daemon.run_state() == "inmigrate"
        if not peak_before:
            await asyncio.sleep(0.5)
            peak_before, idle = daemon.resident_bytes, held(daemon.pid)
        await given_back(daemon.pid, idle, f"all is given back after: {name}")
    assert daemon.resident_bytes - peak_before < 64 << 20
    good = Case("", sync(1) + packet([3, 4, 5], bytes([9]) * 3 * PAGE) + sync(2))
    assert (await offer(daemon, tmp_path, good))["status"] == "completed"
    assert await daemon.run_state() == "paused"


async def test_two_main_connections(
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    await daemon.set_capabilities(MULTIFD)
    path = f"{tmp_path}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": f"unix:{path}", "exit-on-error": False})
    writers = [(await asyncio.open_unix_connection(path))[1] for _ in range(2)]
    for writer in writers:
        writer.write(MAIN)
    info = await daemon.wait_migration("failed")
    assert "a second main connection" in str(info["error-desc"])
    add_fault(request.config, "two main connections", str(info["error-desc"]), "waits")
    for writer in writers:
        writer.close()


@pytest.mark.matrix
async def test_a_channel_that_never_speaks(
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Takes the half minute that the whole set may take to come."""
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    await daemon.set_capabilities(MULTIFD)
    path = f"{tmp_path}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": f"unix:{path}", "exit-on-error": False})
    writers = [(await asyncio.open_unix_connection(path))[1] for _ in range(3)]
    writers[0].write(MAIN)
    writers[1].write(encode_hello(Hello(0, bytes(16))))
    info = await daemon.wait_migration("failed", timeout_s=40)
    assert "only 1 of 2 multifd channels came in 30 s" in str(info["error-desc"])
    add_fault(request.config, "a channel that never speaks", str(info["error-desc"]), "waits")
    for writer in writers:
        writer.close()


async def test_a_source_with_fewer_channels_gives_up(
    qemu_host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Both wait for what never comes, until the source's user cancels."""
    source, daemon = await start_both(
        closing, qemu_host.start("QEMU A"), DaemonProcess.start(incoming="defer")
    )
    await daemon.set_capabilities(MULTIFD)
    await daemon.set_parameters({"multifd-channels": 4})
    path = f"unix:{tmp_path}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": path, "exit-on-error": False})
    await source.wait_serial(3)
    await source.set_capabilities(MULTIFD)
    await source.set_parameters({"multifd-channels": 2})
    await source.execute("migrate", {"uri": path})
    await asyncio.sleep(0.5)
    assert (await daemon.query_migrate())["status"] == "setup"
    await source.execute("migrate_cancel")
    await source.wait_migration("cancelled", "failed")
    info = await daemon.wait_migration("failed")
    assert "channels were awaited" in str(info["error-desc"])
    await source.wait_serial(len(source.serial) + 2)
    name = "QEMU with fewer channels, cancelled"
    add_fault(request.config, name, str(info["error-desc"]), "guest runs on at its source")


@pytest.mark.timeout(600)
async def test_a_channel_lost_on_the_way_out(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """One connection of three breaks anywhere; the guest then moves to the next QEMU."""
    path, digest, serial = parked_file
    daemon = await holder(path, closing)
    await daemon.set_capabilities(MULTIFD | {"return-path": True})
    await daemon.set_parameters({"max-bandwidth": 0})
    rng = random.Random(11)
    outcomes = []
    victims = Ahead(lambda _: qemu_host.start("victim", incoming="defer", paused=True), closing)
    for turn in range(12):
        inner, outer = tmp_path / f"{turn}.qemu", tmp_path / f"{turn}.sock"
        victim = await victims.take()
        await victim.set_capabilities(MULTIFD)
        await victim.execute("migrate-incoming", {"uri": f"unix:{inner}"})
        number = turn % 3
        # What a connection carries at least: its hello, or the head of the stream.
        point = rng.choice((0, 3, 64, 100, 1408, 200_000, rng.randrange(1, 1_000_000)))
        async with ChannelCutter(outer, inner, victim=number, cut_after_bytes=point) as proxy:
            await daemon.execute("migrate", {"uri": f"unix:{outer}"})
            info = await daemon.wait_migration("failed", "completed")
        await victim.close()
        outcomes.append(str(info["status"]))
        if info["status"] == "completed":
            assert not proxy.was_cut
            await daemon.execute("cont")
        assert await daemon.run_state() == "paused"
    await daemon.set_capabilities({"multifd": False})
    await daemon.execute("stop")
    await expect_move(daemon, digest, serial, qemu_host, tmp_path, closing)
    head = ("way", "points", "outcomes", "afterwards")
    counted = f"{outcomes.count('failed')} failed, {outcomes.count('completed')} completed"
    report(request.config, CUT_TABLE, head, "migrationd -> QEMU", "12", counted, "moved on")
    assert outcomes.count("failed") >= 8
    add_fault(request.config, "one channel of three lost, out", counted, "held, then moved whole")


@pytest.mark.timeout(600)
async def test_a_channel_lost_on_the_way_in(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Between two daemons: one of them holds the guest, never both, never none."""
    source = await DaemonProcess.start(incoming=f"file:{parked_file[0]}")
    target = await DaemonProcess.start(incoming="defer")
    closing += [source, target]
    await source.wait_run_state("paused")
    for peer in (source, target):
        await peer.set_capabilities(MULTIFD | {"return-path": True})
    await source.set_parameters({"max-bandwidth": 0})
    rng = random.Random(12)
    failed = 0
    for turn in range(25):
        inner, outer = tmp_path / f"{turn}.in", tmp_path / f"{turn}.sock"
        await target.execute("migrate-incoming", {"uri": f"unix:{inner}", "exit-on-error": False})
        last = turn == 24
        point = rng.choice((0, 63, 64, 1407, 1408, 1409, rng.randrange(1, 2_000_000)))
        cut = -1 if last else turn % 3
        async with ChannelCutter(outer, inner, victim=cut, cut_after_bytes=point) as proxy:
            await source.execute("migrate", {"uri": f"unix:{outer}"})
            ends = [await peer.wait_migration("failed", "completed") for peer in (source, target)]
        states = [await peer.run_state() for peer in (source, target)]
        statuses = [end["status"] for end in ends]
        if statuses == ["completed", "completed"]:
            assert states == ["postmigrate", "paused"]
            break
        assert proxy.was_cut
        assert not last
        assert statuses == ["failed", "failed"]
        assert states == ["paused", "inmigrate"]
        failed += 1
    assert failed >= 3
    assert states == ["postmigrate", "paused"]
    qemu = await qemu_host.start("QEMU B", incoming="defer", paused=True)
    closing.append(qemu)
    await qemu.set_capabilities(MULTIFD)
    uri = f"unix:{tmp_path}/last.sock"
    await qemu.execute("migrate-incoming", {"uri": uri})
    await send(target, qemu, uri, return_path=True)
    assert await memory_digest(qemu, qemu_host) == parked_file[1]
    head = ("way", "points", "outcomes", "afterwards")
    counted = f"{failed} failed, 1 completed"
    report(
        request.config, CUT_TABLE, head, "migrationd -> migrationd", str(failed + 1), counted,
        "one owner each time",
    )  # fmt: skip


async def cancelled(daemon: DaemonProcess, uri: str, ready: Callable[[], bool]) -> None:
    await daemon.execute("migrate", {"uri": uri})
    await until(ready, "the migration is where it is to be cancelled")
    await daemon.execute("migrate_cancel")
    await daemon.wait_migration("cancelled")
    assert await daemon.run_state() == "paused"


async def test_cancel_with_channels_that_nobody_reads(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = await holder(parked_file[0], closing)
    await daemon.set_capabilities(MULTIFD)
    await daemon.set_parameters({"max-bandwidth": 0, "multifd-channels": 8})
    before = held(daemon.pid)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/deaf.sock")
        listener.listen(16)
        listener.settimeout(30)
        taken: list[socket.socket] = []

        def has_all() -> bool:
            taken.append(listener.accept()[0])
            return len(taken) == 9

        await cancelled(daemon, f"unix:{tmp_path}/deaf.sock", has_all)
        for sock in taken:
            sock.close()
    # The backlog is full: connecting the channels is what is cancelled.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/full.sock")
        listener.listen(2)
        await cancelled(daemon, f"unix:{tmp_path}/full.sock", lambda: True)
    await given_back(daemon.pid, before, "all channels are given back")
    await daemon.set_capabilities({"multifd": False})
    arrived, qemu = await move_on(daemon, qemu_host, tmp_path)
    closing.append(qemu)
    assert arrived == parked_file[1]


async def test_postcopy_with_channels_is_refused_where_it_kills_the_destination(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    """QEMU 7.2 accepts the pair and aborts at the end of postcopy."""
    if qemu_version(qemu_host.binary) != "7.2":
        pytest.skip("a guest of a newer machine type may use both")
    daemon = await holder(parked_file[0], closing)
    await daemon.set_capabilities(MULTIFD | {"postcopy-ram": True})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/any.sock")
        listener.listen(4)
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/any.sock"})
        info = await daemon.wait_migration("failed")
    assert "not yet compatible with multifd" in str(info["error-desc"])
    assert await daemon.run_state() == "paused"

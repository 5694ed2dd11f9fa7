"""Files that are damaged, hostile, changed or full: the guest is whole, the daemon goes on."""

import asyncio
import contextlib
import os
import re
import resource
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrationd.ctl.convert_file import Conversion, convert
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.diff_files import compare
from migrationd.ctl.file_guest import FileGuest
from migrationd.errors import MigrationdError
from migrationd.store.mapped_ram import MAP_HEADER_BYTES
from migrationd.store.mapped_ram_reader import read_contents
from migrationd.transport.rate_limit import WINDOW_S
from tests.support.deadline import until
from tests.support.moves import Host, move_on
from tests.support.results import add_fault
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.fault


@pytest.fixture
def mapped(parked_file: tuple[Path, str, str], tmp_path: Path) -> Path:
    """A mapped-ram file of a real guest."""
    target = tmp_path / "guest.mapped-ram"
    convert(parked_file[0], target, Conversion("mapped-ram"))
    return target


@pytest.fixture
async def daemon() -> AsyncIterator[DaemonProcess]:
    async with await DaemonProcess.start(incoming="defer") as process:
        await process.set_capabilities({"mapped-ram": True, "events": True})
        await process.set_parameters({"max-bandwidth": 0})
        yield process


async def load(daemon: DaemonProcess, path: Path) -> None:
    await daemon.execute("migrate-incoming", {"uri": f"file:{path}", "exit-on-error": False})
    await daemon.wait_migration("completed", "failed")


async def error_of(daemon: DaemonProcess) -> str:
    return str((await daemon.query_migrate()).get("error-desc"))


def same_guest(one: Path, other: Path) -> bool:
    with FileGuest(one) as left, FileGuest(other) as right:
        return compare(left.guest, right.guest).is_equal


@pytest.mark.parametrize("mapped_ram", [True, False], ids=["mapped-ram", "plain"])
async def test_a_disk_that_fills_leaves_the_guest_held(
    mapped_ram: bool, mapped: Path, daemon: DaemonProcess, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    await load(daemon, mapped)
    await daemon.set_capabilities({"mapped-ram": mapped_ram})
    with small_disk(tmp_path / "small", "3m") as disk:
        await daemon.execute("migrate", {"uri": f"file:{disk}/guest"})
        await daemon.wait_migration("failed")
        said = await error_of(daemon)
        assert "No space left on device" in said
        assert await daemon.run_state() == "paused"
        with pytest.raises(MigrationdError):
            FileGuest(disk / "guest")
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/again"})
    await daemon.wait_migration("completed")
    assert same_guest(mapped, tmp_path / "again")
    form = "mapped-ram" if mapped_ram else "plain"
    add_fault(request.config, f"ENOSPC, {form}", said, "held, next save whole")


async def test_a_file_size_limit_ends_as_a_failed_migration(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/limited"})
    await daemon.wait_migration("failed")
    assert "File too large" in await error_of(daemon)
    infinity = resource.RLIM_INFINITY
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (infinity, infinity))
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/limited"})
    await daemon.wait_migration("completed")
    assert same_guest(mapped, tmp_path / "limited")


async def test_a_full_ram_dir_refuses_and_keeps_no_half_guest(
    mapped: Path, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    with small_disk(tmp_path / "small", "3m") as disk:
        daemon = await DaemonProcess.start(
            incoming="defer", arguments=["-name", "vm1", "-ram-dir", str(disk)]
        )
        closing.append(daemon)
        await daemon.set_capabilities({"mapped-ram": True})
        await load(daemon, mapped)
        said = await error_of(daemon)
        assert "No space left on device" in said
        assert await daemon.run_state() == "inmigrate"
        add_fault(request.config, "ENOSPC, ram-dir", said, "waits, no half guest")
        assert sorted(path.name for path in disk.iterdir()) == ["vm1.lock"]
        await daemon.close()


async def test_a_guest_whose_file_was_changed_is_not_sent_as_whole(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    with mapped.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"changed")
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/target"})
    await daemon.wait_migration("failed")
    assert "was changed while the guest was held" in await error_of(daemon)
    with pytest.raises(MigrationdError):
        FileGuest(tmp_path / "target")


@pytest.mark.parametrize("mapped_ram", [True, False], ids=["mapped-ram", "plain"])
async def test_a_guest_is_not_written_over_its_own_file(
    mapped_ram: bool, mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    await daemon.set_capabilities({"mapped-ram": mapped_ram})
    before = mapped.stat()
    (tmp_path / "link").hardlink_to(mapped)
    for name in (mapped, tmp_path / "link"):
        with pytest.raises(Exception, match="the file that the guest itself is in"):
            await daemon.execute("migrate", {"uri": f"file:{name}"})
        await daemon.wait_migration("failed")
    assert (mapped.stat().st_size, mapped.stat().st_mtime) == (before.st_size, before.st_mtime)
    assert await daemon.run_state() == "paused"


async def test_a_changed_file_is_noticed_on_any_way_out(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    await daemon.set_capabilities({"mapped-ram": False})
    with mapped.open("r+b") as file:
        file.truncate(6 << 20)
    await daemon.execute("migrate", {"uri": "exec:cat >/dev/null"})
    await daemon.wait_migration("failed")
    assert "was changed while the guest was held" in await error_of(daemon)
    assert await daemon.run_state() == "paused"


CUT = "was changed while|cut short while|Bad address|taken away"


@pytest.mark.parametrize(
    "way",
    [
        "zlib",
        pytest.param("zstd", marks=pytest.mark.matrix),
        pytest.param("plain", marks=pytest.mark.matrix),
        pytest.param("none", marks=pytest.mark.matrix),
        pytest.param("mapped-ram", marks=pytest.mark.matrix),
    ],
)
async def test_a_file_that_is_cut_short_while_it_is_sent(
    way: str, mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    """A look at what is gone would end the daemon."""
    await load(daemon, mapped)
    multifd = way in ("zlib", "zstd", "none")
    async with await DaemonProcess.start(incoming="defer") as sink:
        for end in (daemon, sink):
            await end.set_capabilities({"mapped-ram": False})
            await end.set_capabilities({"multifd": multifd})
            if multifd:
                await end.set_parameters({"multifd-compression": way})
        if way == "mapped-ram":
            await daemon.set_capabilities({"mapped-ram": True})
        uri = f"file:{tmp_path}/out" if way == "mapped-ram" else f"unix:{tmp_path}/sink"
        if way != "mapped-ram":
            await sink.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        await daemon.set_parameters({"max-bandwidth": 200_000})
        await daemon.execute("migrate", {"uri": uri})
        await daemon.wait_migration("active")
        os.truncate(mapped, 1 << 20)
        await daemon.set_parameters({"max-bandwidth": 0})
        await daemon.wait_migration("failed")
        assert re.search(CUT, await error_of(daemon))
        assert await daemon.run_state() == "paused"


async def test_a_file_that_is_cut_short_before_its_pages_are_sampled(
    mapped: Path, daemon: DaemonProcess
) -> None:
    await load(daemon, mapped)
    os.truncate(mapped, 1 << 20)
    await daemon.execute("calc-dirty-rate", {"calc-time": 1})

    async def is_over() -> bool:
        return (await daemon.query("query-dirty-rate"))["status"] == "measured"

    await until(is_over, "the measurement ends")
    assert "cut short" in daemon.stderr
    assert await daemon.run_state() == "paused"


def hostile_files(mapped: Path) -> Iterator[tuple[str, bytes]]:
    """Files with a header that lies, and what the refusal says."""
    with mapped.open("rb") as file:
        blocks = read_contents(file.fileno(), "file").blocks
    data = mapped.read_bytes()
    block = blocks[0]
    header = block.bitmap_position - MAP_HEADER_BYTES
    outside = 1 << 40
    for at, form, value, text in (
        (header, ">I", 2, "header version 2"),
        (header + 4, ">Q", 1 << 16, "pages of 65536 bytes"),
        (header + 12, ">Q", outside, "lies outside the file"),
        (header + 12, ">Q", 0, "over something else"),
        (header + 20, ">Q", outside, "lies outside the file"),
        (header + 20, ">Q", (1 << 64) - 4096, "lies outside the file"),
        (header + 20, ">Q", block.bitmap_position, "over something else"),
        (header + 20, ">Q", block.pages_position + 1, "over something else"),
        (header - 8, ">Q", 1 << 62, "lies outside the file|does not add up"),
        (header - 8, ">Q", 0, "lies outside the file|does not add up"),
    ):
        raw = struct.pack(form, value)
        yield text, data[:at] + raw + data[at + len(raw) :]
    yield "ends too early|lies outside", data[: len(data) // 2]
    yield "ends too early|ended", data[:-9]
    yield "Not a migration stream", b"\0" * 64 + data[64:]
    yield "received capability is off", data.replace(b"mapped-ram", b"mapped-rum", 1)


async def test_hostile_headers_harm_only_themselves(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    refused = 0
    for text, data in hostile_files(mapped):
        path = tmp_path / "hostile"
        path.write_bytes(data)
        await load(daemon, path)
        error = await error_of(daemon)
        assert any(word in error for word in text.split("|")), (text, error)
        assert await daemon.run_state() == "inmigrate"
        trouble = f"mapped-ram file: {text.split('|')[0]}"
        add_fault(request.config, trouble, error, "waits, then takes a good file")
        refused += 1
    assert refused == 14
    await load(daemon, mapped)
    assert await daemon.run_state() == "paused"
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < 40


async def test_cancel_during_a_save(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path, qemu_host: Host, closing: list[object],
    parked_file: tuple[Path, str, str],
) -> None:  # fmt: skip
    await load(daemon, mapped)
    await daemon.set_parameters({"max-bandwidth": 1 << 20})
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/slow"})
    await daemon.wait_migration("active")
    await daemon.execute("migrate_cancel")
    await daemon.wait_migration("cancelled")
    assert await daemon.run_state() == "paused"
    await daemon.set_capabilities({"mapped-ram": False})
    digest, target = await move_on(daemon, qemu_host, tmp_path)
    closing.append(target)
    assert digest == parked_file[1]


async def test_killed_during_a_save_leaves_a_file_that_nobody_takes(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    await daemon.set_parameters({"max-bandwidth": 1 << 20})
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/slow"})
    await daemon.wait_migration("active")
    await asyncio.sleep(0.1)
    await daemon.kill()
    with pytest.raises(MigrationdError, match=r"ends too early|ended|does not"):
        FileGuest(tmp_path / "slow")


async def test_the_bandwidth_limit_holds_for_files(
    mapped: Path, daemon: DaemonProcess, tmp_path: Path
) -> None:
    await load(daemon, mapped)
    await daemon.set_parameters({"max-bandwidth": 8 << 20})
    await daemon.execute("migrate", {"uri": f"file:{tmp_path}/slow"})
    info = await daemon.wait_migration("completed")
    ram = info["ram"]
    assert isinstance(ram, dict)
    seconds = float(str(info["total-time"])) / 1000
    # The first window's bytes go at once.
    assert (ram["transferred"] - (8 << 20) * WINDOW_S) / seconds < 1.03 * (8 << 20)


async def test_mapped_ram_needs_a_file(mapped: Path, daemon: DaemonProcess, tmp_path: Path) -> None:
    await load(daemon, mapped)
    with contextlib.suppress(Exception):
        await daemon.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await daemon.wait_migration("failed")
        assert "requires seekable transport" in await error_of(daemon)
    assert await daemon.run_state() == "paused"

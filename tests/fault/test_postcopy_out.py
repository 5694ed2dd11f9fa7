"""A hostile destination of a postcopy: a typed error, and the guest can still be resumed."""

import asyncio
import time
from pathlib import Path

import pytest

from migrationd.codec.postcopy import bitmap_bytes
from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    RequestPages,
    ResumeAck,
    Shut,
    encode_return_path,
)
from migrationd.codec.stream import StreamDecoder
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from tests.support.deadline import AT_ONCE_S
from tests.support.events import statuses
from tests.support.fake_destination import FakeDestination
from tests.support.moves import Host, check_runs_on
from tests.support.parked_file import holder
from tests.support.postcopy import recover, send_lazily, start_target, wait_status
from tests.support.relay import Relay
from tests.support.results import add_row

pytestmark = pytest.mark.fault

TABLE = "bad destinations of a postcopy: what query-migrate says"
SLOW = {"max-postcopy-bandwidth": 1 << 20}
RAM = "pc.ram"


def report(config: pytest.Config, name: str, when: str, text: str) -> None:
    add_row(config, TABLE, (name, when, text), head=("what came", "when", "status, error-desc"))


def ask(start: int, length: int = 4096, idstr: str | None = RAM) -> bytes:
    return encode_return_path(RequestPages(start, length, idstr))


AT_PACKAGE = {
    "an unknown block": (ask(0, idstr="nothing"), "not in the list"),
    "outside the block": (ask(32 << 20), "outside the block"),
    "across the end": (ask((32 << 20) - 4096, 8192), "outside the block"),
    "at the end of 64 bits": (ask((1 << 64) - 4096), "outside the block"),
    "misaligned": (ask(100), "pages have 4096 bytes"),
    "an odd length": (ask(0, 5000), "pages have 4096 bytes"),
    "no length": (ask(0, 0), "pages have 4096 bytes"),
    "no block named": (ask(0, idstr=None), "before any block was named"),
    "a bitmap unasked": (encode_return_path(RecvBitmap(RAM, bytes(8))), "bitmap of 8 bytes"),
    "RESUME_ACK unasked": (encode_return_path(ResumeAck(1)), "RESUME_ACK without RESUME"),
    "SHUT 0 too early": (encode_return_path(Shut(0)), "SHUT 0 before the end"),
    "SHUT 1": (encode_return_path(Shut(1)), "Sibling indicated error 1"),
    "garbage": (b"\xff" * 64, "unknown message type"),
    "a flood of PONGs": (encode_return_path(Pong(7)) * 5000, "more than 4096 messages"),
}


@pytest.fixture
async def daemon(parked_file: tuple[Path, str, str], closing: list[object]) -> DaemonProcess:
    daemon = await holder(parked_file[0], closing)
    return daemon


async def expect_quick(peer: PeerProcess) -> float:
    """The monitor answers at once, whatever the destination does; seconds that it took."""
    begin = time.monotonic()
    await peer.query_migrate()
    took_s = time.monotonic() - begin
    assert took_s < AT_ONCE_S
    return took_s


@pytest.mark.parametrize("case", AT_PACKAGE)
async def test_what_no_destination_may_say(
    case: str, daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said, text = AT_PACKAGE[case]
    async with FakeDestination(tmp_path / "out", at_package=said):
        await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False, parameters=SLOW)
        info = await daemon.wait_migration("postcopy-paused")
    assert text in str(info["error-desc"])
    assert await daemon.run_state() == "finish-migrate"
    report(request.config, case, "postcopy", f"{info['status']}, {info['error-desc']}")


async def test_a_destination_that_refuses_the_package_does_not_get_the_guest(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    said = encode_return_path(Shut(1))
    async with FakeDestination(tmp_path / "out", at_package=said, is_loading=False):
        await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False, parameters=SLOW)
        info = await daemon.wait_migration("failed")
    assert "Sibling indicated error 1" in str(info["error-desc"])
    assert statuses(daemon)[-2:] == ["failing", "failed"]
    assert await daemon.run_state() == "paused"


async def test_a_preempt_channel_that_never_comes_leaves_the_guest_here(
    daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    async with FakeDestination(tmp_path / "out", takes=1):
        await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=True, parameters=SLOW)
        info = await daemon.wait_migration("failed")
    assert "Failed to connect" in str(info["error-desc"])
    assert await daemon.run_state() == "paused"
    name = "no preempt channel"
    report(request.config, name, "set-up", f"{info['status']}, {info['error-desc']}")


async def test_a_million_requests_for_one_page(
    daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    flood = ask(0) + ask(0, idstr=None) * 1_000_000
    slowest_s = 0.0
    async with FakeDestination(tmp_path / "out", at_package=flood):
        await send_lazily(daemon, f"unix:{tmp_path}/out", preempt=False, parameters=SLOW)
        while True:
            info = await daemon.query_migrate()
            ram = info.get("ram")
            if isinstance(ram, dict) and ram["postcopy-requests"] > 1_000_000:
                break
            slowest_s = max(slowest_s, await expect_quick(daemon))
            await asyncio.sleep(0.05)
        await daemon.wait_migration("postcopy-active")
        assert daemon.resident_bytes < 400 << 20
    text = f"postcopy-active; the monitor's slowest answer {slowest_s * 1000:.0f} ms"
    report(request.config, "1,000,000 requests for one page", "postcopy", text)


def bitmaps(size: int | None = None, idstr: str | None = None) -> bytes:
    """The answer to the first question; ``pc.ram`` is the first block of this guest."""
    length = bitmap_bytes((32 << 20) // 4096) if size is None else size
    return encode_return_path(RecvBitmap(idstr or RAM, bytes(length)))


AT_RESUME = {
    "a bitmap that is too short": (bitmaps(8), b"", "bitmap of 8 bytes for 8192 pages"),
    "a bitmap that is too long": (bitmaps(1 << 20), b"", "bitmap of 1048576 bytes"),
    "another block": (bitmaps(idstr="vga.vram"), b"", "expected the received pages of"),
    "a wrong end mark": (bitmaps()[:-1] + b"\0", b"", "bitmap ends with"),
    "RESUME_ACK for a bitmap": (
        encode_return_path(ResumeAck(1)), b"", "RESUME_ACK without RESUME"
    ),
    "a request before the bitmaps": (ask(0), b"", "a page request outside postcopy"),
    "SHUT 0": (encode_return_path(Shut(0)), b"", "SHUT 0 before the end"),
}  # fmt: skip


async def test_a_hostile_recovery_falls_back_and_a_good_one_works(
    qemu_host: Host, parked_file: tuple[Path, str, str], daemon: DaemonProcess,
    tmp_path: Path, closing: list[object], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    target = await start_target(qemu_host, f"unix:{tmp_path}/out", preempt=False)
    closing.append(target)
    async with Relay(tmp_path / "relay", tmp_path / "out") as relay:
        await send_lazily(daemon, relay.uri, preempt=False, parameters=SLOW)
        await daemon.wait_migration("postcopy-active")
    await daemon.wait_migration("postcopy-paused")
    await wait_status(target, "postcopy-paused")
    for number, (name, (before, behind, text)) in enumerate(AT_RESUME.items()):
        path = tmp_path / f"bad{number}"
        async with FakeDestination(path, at_resume=(before, behind), is_recovery=True):
            await daemon.execute("migrate", {"uri": f"unix:{path}", "resume": True})
            info = await daemon.wait_migration("postcopy-paused")
            assert text in str(info["error-desc"])
            await expect_quick(daemon)
        report(request.config, name, "recovery", f"{info['status']}, {info['error-desc']}")
    await recover(target, f"unix:{tmp_path}/good")
    await daemon.set_parameters({"max-postcopy-bandwidth": 0})
    await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/good", "resume": True})
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    await check_runs_on(parked_file[2], target, qemu_host)


def all_bitmaps(path: Path) -> bytes:
    """The answers to every question about a saved guest: nothing came."""
    decoder = StreamDecoder()
    with open(path, "rb") as file:
        while not decoder.blocks:
            decoder.feed(file.read(1 << 12))
            while decoder.next_record() is not None and not decoder.blocks:
                pass
    return b"".join(
        encode_return_path(RecvBitmap(b.idstr, bytes(bitmap_bytes(b.used_length // 4096))))
        for b in decoder.blocks
    )


async def test_received_pages_are_taken_in_a_recovery_only(
    parked_file: tuple[Path, str, str], daemon: DaemonProcess, tmp_path: Path
) -> None:
    """They would change who has which page while pages flow."""
    async with FakeDestination(tmp_path / "first") as peer:
        await send_lazily(daemon, f"unix:{tmp_path}/first", preempt=False, parameters=SLOW)
        await daemon.wait_migration("postcopy-active")
        assert peer.taken_bytes
        await daemon.execute("migrate-pause")
        await daemon.wait_migration("postcopy-paused")
    answers = (all_bitmaps(parked_file[0]), encode_return_path(ResumeAck(1)) + bitmaps())
    async with FakeDestination(tmp_path / "bad", at_resume=answers, is_recovery=True):
        await daemon.execute("migrate", {"uri": f"unix:{tmp_path}/bad", "resume": True})
        info = await daemon.wait_migration("postcopy-paused")
        assert "1024 bytes outside a recovery" in str(info["error-desc"])

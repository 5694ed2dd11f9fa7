"""cpr-transfer that goes wrong: one process runs on the memory, the other lets go of it."""

import array
import asyncio
import os
import socket
from pathlib import Path

import pytest
from qemu.qmp import QMPError

from migrationd.codec.cpr import CprEntry, CprState, encode_cpr_state, encode_workload_tail
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess
from migrationd.guest.handed import empty_memfd
from tests.interop.test_cpr import listen, migrate, names, pair
from tests.support.cpr import channel, incoming_arguments
from tests.support.deadline import until
from tests.support.peers import CuttingProxy
from tests.support.workloads import Pair

pytestmark = pytest.mark.fault


SHUT = b"\x00\x01\x00\x04"
"""Head of the message that ends a return path."""


def heap_inode(work: DirtierProcess) -> int:
    """Which memory a dirtier has mapped."""
    maps = Path(f"/proc/{work.process.pid}/maps").read_text().splitlines()
    [inode] = {int(line.split()[4]) for line in maps if "memfd:migrationd-heap" in line}
    return inode


async def error_of(daemon: DaemonProcess) -> str:
    """What a daemon says of its failed migration."""
    return str((await daemon.query_migrate()).get("error-desc"))


async def check_only_source_runs(two: Pair) -> None:
    """The source's workload goes on; the destination's has other memory and stands still."""
    await two.here.wait_passes(1)
    await two.source.wait_run_state("running")
    assert two.there.progress() is None
    await until(lambda: heap_inode(two.here) != heap_inode(two.there), "the destination lets go")


async def test_another_version_is_refused_before_the_source_stops(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(PROGRAM.read_text().replace('u64("at")', 'u32("at")'))
    async with pair(tmp_path, there_program=other) as two:
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("failed")
        await two.destination.wait_migration("failed")
        assert "device 'dirtier': field 'at': type uint64 is uint32" in await error_of(
            two.destination
        )
        assert names(two.source) == ["setup", "failing", "failed"]
        await check_only_source_runs(two)


async def test_another_size_is_refused_before_the_source_stops(tmp_path: Path) -> None:
    async with pair(tmp_path, there_mib=8) as two:
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.destination.wait_migration("failed")
        await two.source.wait_migration("failed")
        assert "'heap' of 16 MiB, here are 'heap' of 8 MiB" in await error_of(two.destination)
        assert "STOP" not in names(two.source)
        await check_only_source_runs(two)


@pytest.mark.parametrize("who", ["daemon", "workload"])
async def test_a_destination_that_dies_while_it_has_the_memory(tmp_path: Path, who: str) -> None:
    async with pair(tmp_path) as two:
        await two.source.set_capabilities({"pause-before-switchover": True})
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("pre-switchover")
        assert heap_inode(two.here) == heap_inode(two.there)
        if who == "daemon":
            await two.destination.kill()
        else:
            two.there.process.kill()
            await two.there.process.wait()
            await two.source.execute("migrate-continue", {"state": "pre-switchover"})
        await two.source.wait_migration("failed")
        await two.source.wait_run_state("running")
        await two.here.wait_passes(1)
        if who == "daemon":
            await check_only_source_runs(two)


async def test_a_source_that_dies_leaves_its_workload_to_the_next_daemon(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.source.set_capabilities({"pause-before-switchover": True})
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("pre-switchover")
        await two.source.kill()
        await two.destination.wait_migration("failed")
        await until(
            lambda: heap_inode(two.here) != heap_inode(two.there), "the destination lets go"
        )
        async with await DaemonProcess.start(arguments=two.here.daemon_arguments) as second:
            await second.wait_run_state("paused")
            await second.execute("cont")
            await two.here.wait_passes(1)


async def test_a_cancelled_one_can_be_tried_again(tmp_path: Path) -> None:
    async with pair(tmp_path) as two:
        await two.source.set_capabilities({"pause-before-switchover": True})
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("pre-switchover")
        await two.source.execute("migrate_cancel")
        await two.source.wait_migration("cancelled")
        await two.destination.wait_migration("failed")
        await check_only_source_runs(two)
        await two.source.set_capabilities({"pause-before-switchover": False})
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        await two.there.wait_passes(2)


class LosesTheLastWord(CuttingProxy):
    """A connection that breaks when the destination says that it has the guest."""

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            answer, is_shut, _ = data.partition(SHUT)
            writer.write(answer)
            if is_shut:
                return


async def test_a_source_that_did_not_hear_it_cannot_run_on_the_same_memory(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as two:
        await listen(two, tmp_path)
        async with LosesTheLastWord(tmp_path / "cut", tmp_path / "main"):
            channels = [channel("main", tmp_path / "cut"), channel("cpr", tmp_path / "cpr")]
            await two.source.execute("migrate", {"channels": channels})
            await two.destination.wait_run_state("running")
        await two.source.wait_migration("failed")
        assert await two.source.run_state() != "running"
        with pytest.raises(QMPError, match="another process runs on this memory"):
            await two.source.execute("cont")
        assert await two.source.run_state() != "running"
        last = two.here.progress()
        await two.there.wait_passes(2)
        assert two.here.progress() == last


async def say(path: Path, data: bytes, fds: list[int]) -> None:
    """Be a source that sends this and waits."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        sock.connect(str(path))
        rights = array.array("i", fds)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])
        sock.shutdown(socket.SHUT_WR)
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(sock, 1), 30) == b""


TOLD = (
    b'{"machine": "migrationd-dirtier", "page_size": 4096, "blocks": [["heap", 16777216]], '
    b'"devices": []}'
)
HEAP = CprState((CprEntry("heap"),), encode_workload_tail(TOLD))


LIES: tuple[tuple[CprState | bytes, str | None, str], ...] = (
    (b"QEVM" + bytes(40), None, "no CPR state"),
    (b"QCPR\0\0\0\1\1\0\0\0\2a", None, "ends early"),
    (HEAP, None, "announces 1 descriptors, 0 came"),
    (HEAP, "short", "is 4096 bytes, not 16777216"),
    (HEAP, "pipe", "is 0 bytes, not 16777216"),
    (HEAP, "unsealed", "cannot be sealed and mapped"),
    (CprState((CprEntry("other"),), HEAP.tail), "whole", "came without its memory"),
    (CprState((CprEntry("heap"),)), "whole", "it is no workload"),
    (CprState(HEAP.entries, encode_workload_tail(b"[]")), "whole", "not understood"),
    (
        CprState(HEAP.entries, encode_workload_tail(TOLD.replace(b"dirtier", b"x"))),
        "whole",
        "the source is 'migrationd-x'",
    ),
)


def descriptors(kind: str | None) -> list[int]:
    """What comes along with a lie."""
    if kind is None:
        return []
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(writing)
        return [reading]
    if kind == "unsealed":
        fd = os.memfd_create("x")
        os.ftruncate(fd, 16 << 20)
        return [fd]
    return [empty_memfd("x", 4096 if kind == "short" else 16 << 20)]


async def test_sources_that_lie(tmp_path: Path) -> None:
    there = DirtierProcess(tmp_path, "there")
    arguments = [*there.daemon_arguments, *incoming_arguments(tmp_path / "cpr")]
    async with await DaemonProcess.start(incoming="defer", arguments=arguments) as daemon, there:
        for state, kind, text in LIES:
            data = state if isinstance(state, bytes) else b" ".join(encode_cpr_state(state))
            fds = descriptors(kind)
            await daemon.execute(
                "migrate-incoming", {"uri": f"unix:{tmp_path}/main", "exit-on-error": False}
            )
            await say(tmp_path / "cpr", data, fds)
            await daemon.wait_migration("failed")
            assert text in await error_of(daemon)
            assert not (tmp_path / "main").exists(), "nobody listens for the stream any more"
            for fd in fds:
                os.close(fd)
        assert there.progress() is None

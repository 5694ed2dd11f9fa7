"""QEMU -> migrationd -> QEMU: the guest goes on and its RAM is the same."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import (
    Host,
    check_runs_on,
    incoming_uri,
    memory_digest,
    park,
    parked_guest,
    send,
    source_uri,
)
from tests.support.releases import qemu_binary, release_cases
from tests.support.results import add_row
from tests.support.starting import start_both

pytestmark = pytest.mark.interop

TABLE = "QEMU -> migrationd -> QEMU"
HEAD = ("QEMU", "machine", "transport", "guest", "return path", "goes on", "RAM equal", "completed")


@pytest.mark.parametrize(
    ("version", "machine", "transport", "state"),
    release_cases(("pc", "q35"), ("tcp", "unix"), ("running", "paused")),
)
async def test_move(
    version: str,
    machine: str,
    transport: str,
    state: str,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    row = await move(Host(qemu_binary(version), machine), transport, state, tmp_path, closing)
    report(request.config, (version, machine, transport, state, *row))


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_move_aarch64(
    state: str, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    guest = BootGuest(
        architecture="aarch64", counted_pages=512, filled_pages=1024, pages_per_s=20000
    )
    row = await move(
        Host(qemu_binary(architecture="aarch64"), "virt", guest), "tcp", state, tmp_path, closing
    )
    report(request.config, ("aarch64", "virt", "tcp", state, *row))


def report(config: pytest.Config, row: tuple[str, ...]) -> None:
    add_row(config, TABLE, row, head=HEAD)


async def move(
    host: Host, transport: str, state: str, directory: Path, closing: list[object]
) -> tuple[str, ...]:
    """Move a guest in and out; returns the last columns of its row."""
    return_path = not (transport == "tcp" and state == "running")
    paused = state == "paused"
    source = await host.start("QEMU A")
    closing.append(source)
    uri_in = incoming_uri(transport, directory, "in")
    daemon = await DaemonProcess.start(incoming=uri_in)
    closing.append(daemon)
    await source.wait_serial(3)
    if paused:
        await source.execute("stop")
    await park(
        source, daemon, await source_uri(daemon, uri_in), return_path=return_path, is_live=True
    )
    before = source.serial
    digest = await memory_digest(source, host)
    assert await source.run_state() == "postmigrate"

    uri_out = incoming_uri(transport, directory, "out")
    # A paused guest stays stopped by itself; a running one is held back to compare RAM first.
    target = await host.start("QEMU B", incoming=uri_out, paused=not paused)
    closing.append(target)
    await send(daemon, target, await source_uri(target, uri_out), return_path=return_path)
    assert await daemon.run_state() == "postmigrate"
    assert await target.run_state() == "paused"
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    passes = await check_runs_on(before, target, host)
    return ("yes" if return_path else "no", f"yes, {passes} passes", "yes", "both")


async def test_a_running_guest_resumes_by_itself(
    qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    source, daemon = await parked_guest(qemu_host, tmp_path, closing, is_live=True)
    target = await qemu_host.start("QEMU B", incoming=f"unix:{tmp_path}/out.sock")
    closing.append(target)
    await send(daemon, target, f"unix:{tmp_path}/out.sock", return_path=True)
    assert await target.wait_run_state("running") == "running"
    await check_runs_on(source.serial, target, qemu_host)


@pytest.mark.parametrize(("choice", "state"), [("stop", "paused"), ("cont", "running")])
async def test_stop_and_cont_choose_the_run_state_at_the_destination(
    choice: str, state: str, qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    source, daemon = await start_both(
        closing, qemu_host.start("QEMU A"), DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    )
    await source.wait_serial(1)
    if choice == "cont":
        await source.execute("stop")
    await park(source, daemon, f"unix:{tmp_path}/in.sock", return_path=True)
    await daemon.execute(choice)
    target = await qemu_host.start("QEMU B", incoming=f"unix:{tmp_path}/out.sock")
    closing.append(target)
    await send(daemon, target, f"unix:{tmp_path}/out.sock", return_path=True)
    assert await target.wait_run_state(state) == state


@pytest.mark.parametrize("kind", ["exec", "file", "fd"])
async def test_through_a_file_and_back(
    kind: str, parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path,
    closing: list[object],
) -> None:  # fmt: skip
    path, digest, _ = parked_file
    first = await DaemonProcess.start(
        incoming=f"exec:cat {path}" if kind == "exec" else f"file:{path}"
    )
    closing.append(first)
    await first.wait_run_state("paused")
    saved = tmp_path / "saved"
    if kind == "exec":
        await first.execute("migrate", {"uri": f"exec:cat > {saved}"})
    elif kind == "file":
        await first.execute("migrate", {"uri": f"file:{saved},offset=4k"})
    else:
        with saved.open("wb") as stream:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stream)
        assert writer.stdin is not None
        with writer.stdin as pipe:
            first.qmp.send_fd_scm(pipe.fileno())
            await first.execute("getfd", {"fdname": "out"})
        await first.execute("migrate", {"uri": "fd:out"})
    await first.wait_migration("completed")
    if kind == "fd":
        assert await asyncio.to_thread(writer.wait, 20) == 0
    suffix = ",offset=4k" if kind == "file" else ""
    second = await DaemonProcess.start(incoming=f"file:{saved}{suffix}")
    closing.append(second)
    await second.wait_run_state("paused")
    uri = f"unix:{tmp_path}/out.sock"
    target = await qemu_host.start("QEMU B", incoming=uri)
    closing.append(target)
    await send(second, target, uri, return_path=True)
    assert await memory_digest(target, qemu_host) == digest

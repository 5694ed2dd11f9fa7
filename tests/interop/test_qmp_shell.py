"""The monitor as a person uses it: ``qmp-shell``, line by line, and its pretty output."""

from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import Host, memory_digest
from tests.support.qmp_shell import Shell
from tests.support.results import TABLES, add_row

pytestmark = pytest.mark.interop

TABLE = "a qmp-shell session"


async def test_a_person_moves_the_guest_with_qmp_shell(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    directory = DaemonProcess.make_directory()
    monitor = directory / "person.sock"
    daemon = await DaemonProcess.start(
        incoming=f"file:{parked_file[0]}",
        arguments=["-name", "vm1", "-qmp", f"unix:{monitor},server=on,wait=off"],
    )
    closing.append(daemon)
    await daemon.wait_run_state("paused")
    target = await qemu_host.start("QEMU B", incoming=f"unix:{tmp_path}/b.sock", paused=True)
    closing.append(target)
    shell = await Shell.start([str(monitor)], tmp_path)
    try:
        assert "Connected to QEMU 11.1" in shell.transcript
        assert "'vm1'" in (answer := await shell.type("query-name")) or '"vm1"' in answer
        assert "paused" in await shell.type("query-status")
        answer = await shell.type("migrate uri=rubbish")
        assert "GenericError" in answer
        answer = await shell.type("no-such-command")
        assert "CommandNotFound" in answer
        capability = '{"capability":"return-path","state":true}'
        answer = await shell.type(f"migrate-set-capabilities capabilities=[{capability}]")
        assert "return" in answer
        answer = await shell.type("query-migrate-capabilities")
        assert "return-path" in answer
        assert "return" in await shell.type("migrate-set-parameters max-bandwidth=0")
        assert "return" in await shell.type(f"migrate uri=unix:{tmp_path}/b.sock")
        await daemon.wait_migration("completed")
        answer = await shell.type("query-migrate")
        assert "completed" in answer
        assert "downtime" in answer
        assert "postmigrate" in await shell.type("query-status")
    finally:
        await shell.close()
        (monitor).unlink(missing_ok=True)
        directory.rmdir()
    assert await memory_digest(target, qemu_host) == parked_file[1]
    if TABLE not in request.config.stash.get(TABLES, {}):
        for line in shell.transcript.replace(str(tmp_path), "/tmp").splitlines():
            add_row(request.config, TABLE, (line if len(line) < 160 else line[:157] + "...",))

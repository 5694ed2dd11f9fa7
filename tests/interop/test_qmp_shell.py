"""The monitor as a person uses it: ``qmp-shell``, line by line, and its pretty output."""

import asyncio
import sys
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import Host, memory_digest
from tests.support.results import TABLES, add_row

pytestmark = pytest.mark.interop

TABLE = "a qmp-shell session"
PROMPT = b"(QEMU) "
SHELL = "from qemu.qmp.qmp_shell import main; main()"


class Shell:
    """A ``qmp-shell`` whose lines are typed here."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.transcript = ""

    @classmethod
    async def start(cls, socket: Path, home: Path) -> "Shell":
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-c", SHELL, str(socket),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"HOME": str(home), "TERM": "dumb"},
        )  # fmt: skip
        shell = cls(process)
        await shell._answer()
        return shell

    async def type(self, line: str) -> str:
        """Type a line; what the shell prints until it prompts again."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self.transcript += line + "\n"
        return await self._answer()

    async def _answer(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            text = (await self._process.stdout.readuntil(PROMPT)).decode()
        self.transcript += text
        return text.removesuffix(PROMPT.decode())

    async def close(self) -> None:
        """End of input, as Ctrl-D."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(20):
            await self._process.communicate()


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
    shell = await Shell.start(monitor, tmp_path)
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

"""A ``qmp-shell`` whose lines are typed by a test."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

PROMPT = b"(QEMU) "
PATIENCE_S = 30


class Shell:
    """One shell.

    Attributes:
        transcript: All that was typed and printed.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.transcript = ""

    @classmethod
    async def start(cls, arguments: Sequence[str], home: Path, *, program: str = "main") -> "Shell":
        """Start it and wait for its prompt.

        Args:
            arguments: Of the command line.
            home: Its home and working directory.
            program: ``main`` for ``qmp-shell``, ``main_wrap`` for ``qmp-shell-wrap``.
        """
        code = f"from qemu.qmp.qmp_shell import {program}; {program}()"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-c", code, *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"HOME": str(home), "TERM": "dumb", "PYTHONPATH": ":".join(sys.path)},
            cwd=home,
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
        async with asyncio.timeout(PATIENCE_S):
            text = (await self._process.stdout.readuntil(PROMPT)).decode()
        self.transcript += text
        return text.removesuffix(PROMPT.decode())

    async def close(self) -> None:
        """End of input, as Ctrl-D."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(PATIENCE_S):
            await self._process.communicate()

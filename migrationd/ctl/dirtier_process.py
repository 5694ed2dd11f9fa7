"""The example workload as a child process: does it run, and did it lose anything?"""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from migrationd.ctl.peer_process import DEFAULT_TIMEOUT_S, PeerError
from migrationd.errors import GuestError

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "dirtier.py"
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Progress:
    """What the workload last said of itself."""

    passes: int
    at: int
    mistakes: int
    t: float

    @property
    def place(self) -> tuple[int, int]:
        """Where the writer is."""
        return self.passes, self.at


class DirtierProcess:
    """One dirtier; use it as a context manager.

    Args:
        directory: For its guest socket and its report.
        name: Of both.
        mib: Memory that it writes.
        rate_mb_s: Memory that it writes a second.
        program: Its source.
        binary: A compiled program instead, with a size and rate of its own.
        huge: Whether its memory is in huge pages, which have to be set aside.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        mib: int = 16,
        rate_mb_s: float = 40.0,
        program: Path = PROGRAM,
        binary: Path | None = None,
        huge: bool = False,
    ) -> None:
        self.socket = directory / f"{name}.guest"
        self._report = directory / f"{name}.json"
        self._command = [sys.executable, str(program), str(self.socket)]
        self._command += ["--mib", str(mib), "--rate-mb-s", str(rate_mb_s)]
        self._command += ["--report", str(self._report)]
        if huge:
            self._command.append("--huge")
        if binary is not None:
            self._command = [str(binary), str(self.socket), str(self._report)]
        self.process: asyncio.subprocess.Process

    @property
    def daemon_arguments(self) -> list[str]:
        """What its daemon is started with."""
        return ["-guest", f"attach:{self.socket}"]

    async def __aenter__(self) -> Self:
        """Start it; its daemon may come later."""
        self.process = await asyncio.create_subprocess_exec(*self._command)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill it."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def progress(self) -> Progress | None:
        """What it last said, or None before it ran at all."""
        try:
            return Progress(**json.loads(self._report.read_text()))
        except FileNotFoundError:
            return None

    async def wait_running(self) -> Progress:
        """Wait until it goes on from where it is now.

        Raises:
            PeerError: It does not, in time.
            GuestError: It has lost something.
        """
        before = self.progress()

        def is_further() -> bool:
            now = self.progress()
            return now is not None and (before is None or now.place > before.place)

        return await self._wait(is_further, "the workload does not go on")

    async def wait_passes(self, count: int) -> Progress:
        """Wait for so many more passes over all of its memory, which check every page.

        Raises:
            PeerError: They do not come in time.
            GuestError: It has lost something.
        """
        wanted = (await self.wait_running()).passes + count

        def is_done() -> bool:
            now = self.progress()
            return now is not None and now.passes >= wanted

        return await self._wait(is_done, f"the workload does not make {count} passes")

    async def _wait(self, condition: Callable[[], bool], what: str) -> Progress:
        deadline = asyncio.get_running_loop().time() + DEFAULT_TIMEOUT_S
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                raise PeerError(f"{what}: it is at {self.progress()}")
            await asyncio.sleep(_POLL_S)
        now = self.progress()
        assert now is not None
        if now.mistakes:
            raise GuestError(f"{now.mistakes} pages do not hold what was written to them")
        return now

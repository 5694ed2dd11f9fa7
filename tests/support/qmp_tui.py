"""A ``qmp-tui`` on a terminal of its own, with a person at its keyboard."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

PATIENCE_S = 30.0
REDRAW_S = 0.3
_ROWS, _COLUMNS = 40, 160
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][AB012]|\x1b[=>78]|[\x0e\x0f]")


class Tui:
    """One terminal.

    Attributes:
        shown: All that was ever put on it, without the control sequences.
    """

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._raw = b""
        self._came = asyncio.Event()
        os.set_blocking(terminal, False)
        asyncio.get_running_loop().add_reader(terminal, self._read)

    @property
    def shown(self) -> str:
        """All that was ever put on it, without the control sequences."""
        text = _CONTROL.sub(b"\n", _COLOUR.sub(b"", self._raw)).decode("utf-8", "replace")
        return re.sub(r"\n\s*\n", "\n", text)

    def type(self, text: str) -> None:
        """Click into the editor, type, and end the message as one does there: Alt-Enter."""
        at = f"0;10;{_ROWS - 5}"
        self.press(f"\x1b[<{at}M\x1b[<{at}m{text}")
        self.press("\x1b\r")

    def press(self, key: str) -> None:
        """Press a key."""
        os.write(self._terminal, key.encode())

    async def wait_for(self, text: str) -> None:
        """Wait until something is on the terminal, as often as it takes to draw it."""
        wanted = re.sub(r"\s", "", text)
        async with asyncio.timeout(PATIENCE_S):
            while wanted not in re.sub(r"\s", "", self.shown):
                self._came.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._came.wait(), REDRAW_S)
                    continue
                # It draws what has come when a key is pressed: "draw it all again".
                self.press("\x0c")

    def _read(self) -> None:
        try:
            data = os.read(self._terminal, 65536)
        except BlockingIOError:
            return
        except OSError:  # nobody has the other end open any more
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._terminal)
        self._raw += data
        self._came.set()


@contextlib.asynccontextmanager
async def tui(address: Path, home: Path) -> AsyncIterator[Tui]:
    """Start one on a monitor."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    code = "from qemu.qmp.qmp_tui import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", code, str(address),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"HOME": str(home), "TERM": "xterm", "PYTHONPATH": ":".join(sys.path)},
        cwd=home,
    )  # fmt: skip
    os.close(theirs)
    screen = Tui(ours)
    try:
        yield screen
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)

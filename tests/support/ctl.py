"""``migrationctl`` as a process of its own, as people start it."""

import asyncio
import os
import sys

COMMAND = (sys.executable, "-c", "from migrationd.ctl.app import main; main()")


async def start_ctl(*words: str) -> asyncio.subprocess.Process:
    """Start it; its standard output has all that it prints, on a wide screen."""
    return await asyncio.create_subprocess_exec(
        *COMMAND, *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


async def ctl(*words: str) -> tuple[int, str]:
    """Run it; its exit status and all that it printed."""
    process = await start_ctl(*words)
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode()

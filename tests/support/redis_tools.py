"""``redis-cli`` and ``redis-benchmark`` as clients of a server that moves.

Both increment, so that a reply says which writes it acknowledges: a counter that is ever
behind what was said before has lost one.
"""

import asyncio
import contextlib
import shutil
import time

TOOLS = ("redis-cli", "redis-benchmark")

RUN = 1000
"""Requests of one run of ``redis-benchmark``."""

_LONGEST_RUN_S = 4.0

BENCHMARK_KEY = "counter:__rand_int__"
"""What its ``incr`` test increments when it is not told to choose keys."""


def missing_tools() -> list[str]:
    """Those that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class CliClient:
    """One ``redis-cli`` that increments a counter of its own, one command after the other.

    Attributes:
        acknowledged: Replies that named a new value.
        last: The value of the last one.
        lost: How far a later reply ever was behind an earlier one.
        longest_gap_s: Longest time without a reply.
    """

    def __init__(self, number: int, port: int) -> None:
        self.key = f"cli:{number}"
        self._port = port
        self.acknowledged = 0
        self.last = 0
        self.lost = 0
        self.longest_gap_s = 0.0

    async def run(self) -> None:
        """Increment until cancelled."""
        process = await asyncio.create_subprocess_exec(
            "redis-cli",
            "-p",
            str(self._port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        at_s = time.monotonic()
        try:
            while True:
                process.stdin.write(f"incr {self.key}\n".encode())
                line = (await process.stdout.readline()).strip()
                if not line.isdigit():
                    # It says that the connection is lost, and makes another for the next.
                    await asyncio.sleep(0.002)
                    continue
                now_s = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now_s - at_s)
                at_s = now_s
                self._note(int(line))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _note(self, value: int) -> None:
        self.lost = max(self.lost, self.last + 1 - value)
        self.last = max(self.last, value)
        self.acknowledged += 1


class BenchmarkClient:
    """``redis-benchmark``, run after run; a run that loses its connection ends.

    Attributes:
        runs: Runs in which every request was answered.
        cut: Runs that ended early.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.runs = 0
        self.cut = 0

    async def run(self) -> None:
        """Run it until cancelled."""
        arguments = ["-p", str(self._port), "-t", "incr", "-n", str(RUN), "-c", "4", "-q"]
        while True:
            process = await asyncio.create_subprocess_exec(
                "redis-benchmark",
                *arguments,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                # One that finds nobody to connect to again goes round for ever.
                status = await asyncio.wait_for(process.wait(), _LONGEST_RUN_S)
            except TimeoutError:
                status = 1
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            if status:
                self.cut += 1
                await asyncio.sleep(0.01)
            else:
                self.runs += 1

    @property
    def acknowledged(self) -> int:
        """Requests that were certainly answered."""
        return self.runs * RUN


async def counter(port: int, key: str) -> int:
    """Value of a counter, asked with ``redis-cli``."""
    process = await asyncio.create_subprocess_exec(
        "redis-cli", "-p", str(port), "get", key, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return int(out.strip() or 0)

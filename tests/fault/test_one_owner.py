"""Never do two copies of a workload run, whatever happens to whom and when.

A random walk over moves, cancels, kills and faults. Every step that a copy makes is on
record: had two run from the same state, or one again from an older one, a number would be
there twice.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from qemu.qmp import QMPError

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError
from tests.support.deadline import until
from tests.support.workloads import needs_scan

pytestmark = [pytest.mark.fault, needs_scan]

SUPPORT = Path(__file__).resolve().parents[1] / "support"
FAULTS = (
    None,
    ("check", "refuses"),
    ("load", "refuses"),
    ("load", "killed"),
    ("load", "killed after"),
    ("start", "killed"),
    ("start", "refuses"),
)
PROGRESS = ("setup", "active", "pre-switchover", "device", "postcopy-device", "postcopy-active")


class Side:
    """A daemon and its workload."""

    def __init__(self, daemon: DaemonProcess, work: asyncio.subprocess.Process) -> None:
        self.daemon = daemon
        self.work = work
        self.is_alive = True

    async def end(self) -> None:
        """Kill both."""
        with contextlib.suppress(ProcessLookupError):
            self.work.kill()
        await self.work.wait()
        await self.daemon.close()


class OneOwner(RuleBasedStateMachine):
    """The walk: ``here`` has the guest at first, ``there`` is where it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="owner-"))
        self.log = self.directory / "log"
        self.log.touch()
        self.number = 0
        self.here: Side
        self.there: Side | None = None
        self.moved = False

    def run(self, work: Any) -> Any:  # noqa: ANN401
        return self.runner.run(work)

    async def side(self, incoming: str | None, fault: tuple[str, str] | None) -> Side:
        self.number += 1
        socket = self.directory / f"{self.number}.guest"
        program = [str(SUPPORT / "lineage.py")]
        if fault is not None:
            program = [str(SUPPORT / "faulty_workload.py"), *fault, *program]
        daemon = await DaemonProcess.start(
            incoming=incoming, arguments=["-guest", f"attach:{socket}"]
        )
        arguments = [str(socket), str(self.log), f"copy{self.number}"]
        work = await asyncio.create_subprocess_exec(
            sys.executable, *program, *arguments, stderr=asyncio.subprocess.DEVNULL
        )
        if incoming is None:
            await daemon.wait_run_state("running")
        return Side(daemon, work)

    @initialize()
    def begin(self) -> None:
        self.here = self.run(self.side(None, None))

    @precondition(lambda self: self.there is None and not self.moved)
    @rule(
        fault=st.sampled_from(FAULTS),
        return_path=st.booleans(),
        pause=st.booleans(),
        postcopy=st.booleans(),
        bandwidth=st.sampled_from((0, 1 << 20)),
    )
    def migrate(
        self,
        fault: tuple[str, str] | None,
        return_path: bool,
        pause: bool,
        postcopy: bool,
        bandwidth: int,
    ) -> None:
        async def start() -> None:
            self.there = there = await self.side("defer", fault)
            here = self.here.daemon
            capabilities = {
                "return-path": return_path,
                "pause-before-switchover": pause,
                "postcopy-ram": postcopy and return_path,
            }
            with contextlib.suppress(QMPError, EOFError, OSError):
                for daemon in (here, there.daemon):
                    await daemon.set_capabilities(capabilities)
                await there.daemon.execute(
                    "migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False}
                )
                await here.set_parameters({"max-bandwidth": bandwidth})
                await here.execute("migrate", {"uri": await there.daemon.listening_uri()})

        self.run(start())

    async def status(self) -> str:
        try:
            return str((await self.here.daemon.query_migrate()).get("status", "none"))
        except (QMPError, EOFError, OSError):
            return "gone"

    @rule(ms=st.sampled_from((0, 5, 20, 100, 300)))
    def wait(self, ms: int) -> None:
        self.run(asyncio.sleep(ms / 1000))

    @precondition(lambda self: self.there is not None)
    @rule(command=st.sampled_from(("migrate_cancel", "migrate-start-postcopy", "migrate-continue")))
    def command(self, command: str) -> None:
        arguments = {"state": "pre-switchover"} if command == "migrate-continue" else None

        async def execute() -> None:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self.here.daemon.execute(command, arguments)

        self.run(execute())

    @precondition(lambda self: self.there is not None)
    @rule(
        whose=st.sampled_from(("here", "there")),
        what=st.sampled_from(("daemon", "work")),
        how=st.sampled_from((signal.SIGKILL, signal.SIGTERM)),
    )
    def kill(self, whose: str, what: str, how: signal.Signals) -> None:
        side = self.here if whose == "here" else self.there
        assert side is not None
        pid = side.daemon.pid if what == "daemon" else side.work.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        side.is_alive = False

    @precondition(lambda self: self.there is not None)
    @rule()
    def settle(self) -> None:
        """Let the migration come to its end; the next begins with whoever has the guest."""

        async def wait() -> None:
            async def is_over() -> bool:
                status = await self.status()
                if status == "pre-switchover":
                    with contextlib.suppress(QMPError, EOFError, OSError):
                        await self.here.daemon.execute(
                            "migrate-continue", {"state": "pre-switchover"}
                        )
                return status not in PROGRESS

            with contextlib.suppress(QMPError, EOFError, OSError):
                await self.here.daemon.set_parameters({"max-bandwidth": 0})
            await until(is_over, "the migration ends")
            assert self.there is not None
            with contextlib.suppress(PeerError, QMPError, EOFError, OSError):
                if await self.status() == "completed" and self.there.is_alive:
                    await self.there.daemon.wait_run_state("running", timeout_s=2)
            self.check()

        self.run(wait())
        self.moved = True  # who has it now is not ours to say: the next example begins anew

    @invariant()
    def check(self) -> None:
        """Steps of one lineage are on record once each, in order, and nothing was lost."""
        last: dict[str, int] = {}
        for line in self.log.read_text().splitlines():
            lineage, step, mistakes, name = line.split()
            assert int(step) == last.get(lineage, 0) + 1, f"step {step} again, by {name}"
            assert mistakes == "0", f"{name} has lost {mistakes} pages"
            last[lineage] = int(step)

    def teardown(self) -> None:
        async def end() -> None:
            for side in (getattr(self, "here", None), self.there):
                if side is not None:
                    await side.end()

        try:
            # What still runs, or comes to run late, is on record as well.
            self.run(asyncio.sleep(0.3))
            self.check()
        finally:
            self.run(end())
            self.runner.close()
            shutil.rmtree(self.directory, ignore_errors=True)


def walk(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        OneOwner,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_short_walk() -> None:
    walk(examples=4, steps=8)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_long_walk() -> None:
    walk(examples=60, steps=12)

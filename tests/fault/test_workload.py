"""A workload that dies, hangs or lies at any request, on either side of its migration.

Whatever it does: the daemons live, the other side is unharmed, the error says what it
was, and never do two copies run.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import DirtierProcess
from tests.support import workloads
from tests.support.deadline import until
from tests.support.resources import given_back, held
from tests.support.results import add_row
from tests.support.starting import start_both
from tests.support.workloads import needs_scan

pytestmark = [pytest.mark.fault, needs_scan]

FAULTY = Path(__file__).resolve().parents[1] / "support" / "faulty_workload.py"


@dataclass(frozen=True, slots=True)
class Case:
    """A fault, and what has to come of it.

    Attributes:
        at: Request.
        fault: What the workload does then.
        text: Part of an error that one of the daemons has or logs.
        ends: Status of the migration at the source; None if it cannot begin at all.
        runs: Which copy runs in the end, if any.
    """

    at: str
    fault: str
    text: str
    ends: str | None = "failed"
    runs: str | None = "here"


QUICK = ("stop-killed", "save-killed", "save-wrong length", "hello-two pipes", "load-killed")
"""Cases of the default run; the others are of the full matrix."""


def parameters(side: str, cases: list[Case]) -> list[object]:
    names = [f"{case.at}-{case.fault}" for case in cases]
    return [
        pytest.param(
            side, case, id=f"{side}-{name}", marks=[] if name in QUICK else [pytest.mark.matrix]
        )
        for case, name in zip(cases, names, strict=True)
    ]


AT_SOURCE = [
    Case("hello", "killed", "the workload is gone", ends=None, runs=None),
    Case("hello", "another version", "speaks version 9", ends=None, runs=None),
    Case("hello", "unknown member", "surprise", ends=None, runs=None),
    Case("hello", "none passed", "descriptors and passes 0", ends=None, runs=None),
    Case("hello", "none given", "", runs="here"),
    Case("hello", "two pipes", "PAGEMAP_SCAN", runs="here"),
    Case("block", "a pipe", "does not fit its memfd", ends=None, runs=None),
    Case("block", "can shrink", "cannot be sealed", ends=None, runs=None),
    Case("begin", "killed", "the workload is gone", ends=None, runs=None),
    Case("begin", "refuses", "not this time", ends=None, runs=None),
    Case("begin", "hangs", "does not answer", ends=None, runs=None),
    Case("stop", "killed", "the workload is gone", runs=None),
    Case("stop", "killed after", "the workload is gone", runs=None),
    Case("stop", "refuses", "not this time"),
    Case("stop", "hangs", "does not answer"),
    Case("stop", "no JSON", "no JSON"),
    Case("stop", "too long", "too long"),
    Case("stop", "descriptors", "answers stop with descriptors"),
    Case("stop", "stale answers", "does not answer", runs=None),
    Case("save", "killed", "the workload is gone", runs=None),
    Case("save", "killed after", "", ends="completed", runs="there"),
    Case("save", "refuses", "not this time"),
    Case("save", "hangs", "does not answer", runs=None),
    Case("save", "no memfd", "without their memfd"),
    Case("save", "a pipe", "announced 20 bytes of devices and has 0"),
    Case("save", "wrong length", "announced 19 bytes of devices and has 20"),
    Case("save", "another device", "has declared [('dirtier', 0)]"),
    Case("save", "unknown member", "surprise"),
]

AT_DESTINATION = [
    Case("begin", "killed", "no workload is attached"),
    Case("check", "killed", "the workload is gone"),
    Case("check", "refuses", "not this time"),
    Case("check", "hangs", "does not answer"),
    Case("load", "killed", "the workload is gone"),
    Case("load", "killed after", "", ends="completed", runs=None),
    Case("load", "refuses", "not this time"),
    Case("load", "no JSON", "no JSON"),
    Case("load", "hangs", "does not answer"),
    Case("start", "killed", "the workload is gone", ends="completed", runs=None),
    Case("start", "refuses", "not this time", ends="completed", runs=None),
]


class FaultyDirtier(DirtierProcess):
    """A dirtier that fails at one request."""

    def __init__(self, directory: Path, name: str, case: Case | None) -> None:
        super().__init__(directory, name, mib=4, rate_mb_s=20.0)
        if case is not None:
            self._command = [sys.executable, str(FAULTY), case.at, case.fault, *self._command[1:]]


class Pair(workloads.Pair):
    """Two workloads that may fail, and what became of them."""

    async def runs(self) -> set[str]:
        """The copies that go on within a quarter of a second."""
        before = self.here.progress(), self.there.progress()
        await asyncio.sleep(0.25)
        after = self.here.progress(), self.there.progress()
        sides = zip(("here", "there"), before, after, strict=True)
        return {side for side, old, new in sides if old != new}

    async def errors(self) -> str:
        """What the daemons say of it."""
        texts = [self.source.stderr, self.destination.stderr]
        infos = [await daemon.query_migrate() for daemon in (self.source, self.destination)]
        return "\n".join(texts + [str(info.get("error-desc")) for info in infos])


@contextlib.asynccontextmanager
async def pair(directory: Path, *, here: Case | None, there: Case | None) -> AsyncIterator[Pair]:
    works = FaultyDirtier(directory, "here", here), FaultyDirtier(directory, "there", there)
    async with contextlib.AsyncExitStack() as stack:
        source, destination = await start_both(
            stack,
            DaemonProcess.start(arguments=works[0].daemon_arguments),
            DaemonProcess.start(incoming="defer", arguments=works[1].daemon_arguments),
        )
        await destination.execute(
            "migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False}
        )
        for work in works:
            await stack.enter_async_context(work)
        yield Pair(source, destination, *works)


@pytest.mark.parametrize(
    ("side", "case"),
    [*parameters("source", AT_SOURCE), *parameters("destination", AT_DESTINATION)],
)
async def test_one_fault(
    tmp_path: Path, side: str, case: Case, request: pytest.FixtureRequest
) -> None:
    at_source = side == "source"
    async with pair(
        tmp_path, here=case if at_source else None, there=None if at_source else case
    ) as two:
        if case.ends is None:
            await until(lambda: case.text in two.source.stderr, "the refusal")
            status = await two.source.run_state()
            assert status == "prelaunch"
        else:
            await two.source.wait_run_state("running")
            await two.here.wait_running()
            await two.source.set_capabilities({"return-path": True})
            await two.source.execute("migrate", {"uri": await two.destination.listening_uri()})
            info = await two.source.wait_migration("completed", "failed", timeout_s=40)
            status = str(info["status"])
            assert status == case.ends, info
        wanted = {case.runs} - {None}

        async def is_so() -> bool:
            found = await two.runs()
            assert len(found) <= 1, "two copies run"
            return found == wanted

        await until(is_so, f"runs: {case.runs}")
        assert case.text in await two.errors()
        for daemon in (two.source, two.destination):
            assert await daemon.run_state(), "the daemon answers"
        await a_next_one_is_taken(tmp_path, two, at_source)
    table = "faults of a workload: side, at, fault, migration, who runs then, what is told"
    add_row(request.config, table, (side, case.at, case.fault, status, str(case.runs), case.text))


async def a_next_one_is_taken(directory: Path, two: Pair, at_source: bool) -> None:
    """A healthy workload attaches to the daemon whose workload was the faulty one."""
    daemon, work = (two.source, two.here) if at_source else (two.destination, two.there)
    if work.process.returncode is None:
        work.process.kill()
    await work.process.wait()
    work._command = DirtierProcess(directory, work.socket.stem, mib=4, rate_mb_s=20.0)._command
    async with work:
        if at_source:
            await daemon.wait_run_state("running", "postmigrate")
        else:
            marks = len(daemon.stderr)
            await until(lambda: "attached" in daemon.stderr[marks:], "it attaches")


async def test_workloads_that_die_on_their_way_leave_nothing_behind(tmp_path: Path) -> None:
    socket = FaultyDirtier(tmp_path, "here", None)
    async with await DaemonProcess.start(arguments=socket.daemon_arguments) as daemon:
        await daemon.set_parameters({"max-bandwidth": 1 << 20})

        async def die() -> None:
            async with FaultyDirtier(tmp_path, "here", None) as work:
                await daemon.wait_run_state("running")
                await daemon.execute("migrate", {"uri": "exec:cat > /dev/null"})
                await daemon.wait_migration("active")
                work.process.kill()
                await work.process.wait()
                await daemon.wait_migration("failed")

        await die()
        before = held(daemon.pid)
        await die()
        await given_back(daemon.pid, before, "the memory of a dead workload is given back")


@pytest.mark.parametrize("capabilities", [{}, {"multifd": True}, {"postcopy-ram": True}])
async def test_one_that_dies_on_a_slow_way_is_missed_at_once(
    capabilities: dict[str, bool], tmp_path: Path
) -> None:
    """What it had written would take minutes."""
    async with workloads.pair(tmp_path, mib=64, incoming=capabilities) as two:
        await two.here.wait_passes(1)
        await two.begin(max_bandwidth=200 << 10, **capabilities)
        await two.source.wait_migration("active")
        two.here.process.kill()
        info = await two.source.wait_migration("failed", timeout_s=20)
        assert info["error-desc"] == "the workload is gone"
        await two.destination.wait_migration("failed")
        assert await two.destination.run_state() == "inmigrate"


async def test_one_that_dies_while_its_user_is_asked(tmp_path: Path) -> None:
    async with workloads.pair(tmp_path) as two:
        await two.begin(pause_before_switchover=True)
        await two.source.wait_migration("pre-switchover")
        two.here.process.kill()
        info = await two.source.wait_migration("failed")
        assert info["error-desc"] == "the workload is gone"
        await two.destination.wait_migration("failed")

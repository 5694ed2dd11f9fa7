"""Jobs, their statuses and what they take in which one."""

import asyncio

import pytest

from migrationd.clock import SystemClock
from migrationd.daemon import jobs as jobs_module
from migrationd.daemon.jobs import Jobs
from migrationd.errors import QMPError, StoreError
from migrationd.qmp.event_bus import EventBus


class Bench:
    """Jobs, the statuses that they went through, and their tasks."""

    def __init__(self) -> None:
        bus = EventBus(SystemClock())
        bus.attach(self._note)
        self.seen: list[tuple[object, object]] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.jobs = Jobs(bus, self.tasks.append)
        self.go_on = asyncio.Event()

    def _note(self, event: dict[str, object]) -> None:
        assert event["event"] == "JOB_STATUS_CHANGE"
        data = event["data"]
        assert isinstance(data, dict)
        self.seen.append((data["id"], data["status"]))

    async def wait(self) -> None:
        await self.go_on.wait()

    async def fail(self) -> None:
        raise StoreError("no room")

    async def finish(self) -> None:
        self.go_on.set()
        await asyncio.gather(*self.tasks)

    def statuses(self) -> list[object]:
        return [status for _, status in self.seen]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


def refuse(bench: Bench, verb: str, job_id: str) -> str:
    with pytest.raises(QMPError) as refused:
        getattr(bench.jobs, verb)(job_id)
    return refused.value.desc


async def test_a_success(bench: Bench) -> None:
    bench.jobs.start("s0", "snapshot-save", bench.wait)
    assert bench.statuses() == ["created", "running"]
    (job,) = bench.jobs.list()
    assert (job.status, job.done, job.error) == ("running", 0, None)
    await bench.finish()
    assert bench.statuses() == ["created", "running", "waiting", "pending", "concluded"]
    assert (job.done, job.error) == (1, None)
    bench.jobs.dismiss("s0")
    assert bench.seen[-1] == ("s0", "null")
    assert bench.jobs.list() == []


async def test_a_failure(bench: Bench) -> None:
    bench.jobs.start("s0", "snapshot-save", bench.fail)
    await bench.finish()
    assert bench.statuses() == ["created", "running", "aborting", "concluded"]
    assert bench.jobs.list()[0].error == "no room"


async def test_a_defect_ends_the_job_too(bench: Bench) -> None:
    async def work() -> None:
        raise ZeroDivisionError

    bench.jobs.start("s0", "snapshot-save", work)
    await bench.finish()
    assert bench.statuses()[-1] == "concluded"
    assert "internal error" in str(bench.jobs.list()[0].error)


async def test_cancelled_jobs_do_their_work_and_say_so(bench: Bench) -> None:
    bench.jobs.start("s0", "snapshot-save", bench.wait)
    bench.jobs.cancel("s0")
    await bench.finish()
    assert bench.statuses() == ["created", "running", "aborting", "concluded"]
    assert bench.jobs.list()[0].error == "Operation canceled"


async def test_verbs_that_do_not_fit(bench: Bench) -> None:
    for verb in ("cancel", "pause", "resume", "complete", "finalize", "dismiss"):
        assert refuse(bench, verb, "nosuch") == "Job not found"
    bench.jobs.start("x", "snapshot-save", bench.wait)
    for verb in ("complete", "finalize", "dismiss"):
        text = f"Job 'x' in state 'running' cannot accept command verb '{verb}'"
        assert refuse(bench, verb, "x") == text
    assert refuse(bench, "resume", "x") == "Can't resume a job that was not paused"
    bench.jobs.pause("x")
    assert refuse(bench, "pause", "x") == "Job is already paused"
    bench.jobs.resume("x")
    await bench.finish()
    for verb in ("cancel", "pause", "complete", "finalize"):
        text = f"Job 'x' in state 'concluded' cannot accept command verb '{verb}'"
        assert refuse(bench, verb, "x") == text
    assert refuse(bench, "resume", "x") == "Can't resume a job that was not paused"


async def test_ids(bench: Bench) -> None:
    bench.jobs.start("job-1.a_B", "snapshot-save", bench.wait)
    for job_id, text in (
        ("job-1.a_B", "Job ID 'job-1.a_B' already in use"),
        ("1x", "Invalid job ID '1x'"),
        ("", "Invalid job ID ''"),
        ("a b", "Invalid job ID 'a b'"),
        ("ä", "Invalid job ID 'ä'"),
    ):
        with pytest.raises(QMPError) as refused:
            bench.jobs.start(job_id, "snapshot-save", bench.wait)
        assert refused.value.desc == text
    await bench.finish()


async def test_there_is_an_end_to_their_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_JOBS", 2)
    for job_id in ("a", "b"):
        bench.jobs.start(job_id, "snapshot-save", bench.fail)
    with pytest.raises(QMPError, match="dismiss"):
        bench.jobs.start("c", "snapshot-save", bench.fail)
    await bench.finish()
    bench.jobs.dismiss_all()
    assert bench.jobs.list() == []
    assert bench.seen[-2:] == [("a", "null"), ("b", "null")]

"""Jobs: long work that a client starts, looks after and dismisses."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from migrationd.errors import MigrationdError, QMPError
from migrationd.migration.job_status import FAILURE, SUCCESS, check_job_id, check_verb
from migrationd.qmp.event_bus import EventBus

log = logging.getLogger(__name__)

MAX_JOBS = 1024
"""Jobs that nobody dismisses do not fill the memory."""


@dataclass(slots=True)
class Job:
    """One job.

    Attributes:
        id: What the client calls it.
        type: QMP JobType.
        status: QMP JobStatus.
        error: Why it failed, or None.
        done: Progress, out of 1.
        is_paused: Whether a client has paused it; it stops at no point between.
        is_cancelled: Whether a client has cancelled it; as in QEMU its work is done all the same.
    """

    id: str
    type: str
    status: str = "undefined"
    error: str | None = None
    done: int = 0
    is_paused: bool = False
    is_cancelled: bool = False


class Jobs:
    """All jobs of the process; lives on the event loop.

    Args:
        bus: Where JOB_STATUS_CHANGE goes.
        spawn: Owns the tasks.
    """

    def __init__(self, bus: EventBus, spawn: Callable[["asyncio.Future[None]"], None]) -> None:
        self._bus = bus
        self._spawn = spawn
        self._jobs: dict[str, Job] = {}

    def list(self) -> list[Job]:
        """Every job that was not dismissed."""
        return list(self._jobs.values())

    def start(self, job_id: str, job_type: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start a job; it is ``running`` when this returns.

        Args:
            job_id: Chosen by the client.
            job_type: QMP JobType.
            work: What it does; what it raises is the job's error.

        Raises:
            QMPError: The id is taken or malformed.
        """
        check_job_id(job_id)
        if job_id in self._jobs:
            raise QMPError(f"Job ID '{job_id}' already in use")
        if len(self._jobs) >= MAX_JOBS:
            raise QMPError(f"there are {MAX_JOBS} jobs already; dismiss those that are concluded")
        job = self._jobs[job_id] = Job(job_id, job_type)
        self._enter(job, "created")
        self._enter(job, "running")
        self._spawn(asyncio.ensure_future(self._run(job, work)))

    def cancel(self, job_id: str) -> None:
        """``job-cancel``."""
        self._find(job_id, "cancel").is_cancelled = True

    def pause(self, job_id: str) -> None:
        """``job-pause``."""
        job = self._find(job_id, "pause")
        if job.is_paused:
            raise QMPError("Job is already paused")
        job.is_paused = True

    def resume(self, job_id: str) -> None:
        """``job-resume``."""
        if not self._find(job_id).is_paused:
            raise QMPError("Can't resume a job that was not paused")
        self._find(job_id, "resume").is_paused = False

    def complete(self, job_id: str) -> None:
        """``job-complete``: no job here waits to be completed."""
        self._find(job_id, "complete")

    def finalize(self, job_id: str) -> None:
        """``job-finalize``: jobs here finalise themselves."""
        self._find(job_id, "finalize")

    def dismiss(self, job_id: str) -> None:
        """``job-dismiss``."""
        job = self._find(job_id, "dismiss")
        self._enter(job, "null")
        del self._jobs[job_id]

    def dismiss_all(self) -> None:
        """What the end of the process does to concluded jobs."""
        for job in self.list():
            if job.status == "concluded":
                self.dismiss(job.id)

    async def _run(self, job: Job, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            if job.is_cancelled:
                job.error = "Operation canceled"
        except MigrationdError as error:
            job.error = error.desc if isinstance(error, QMPError) else str(error)
        except Exception as error:  # a defect of ours must not leave the job running
            log.error("internal error in job '%s'", job.id, exc_info=error)
            job.error = f"internal error: {error!r}"
        job.done = 1
        for status in SUCCESS if job.error is None else FAILURE:
            self._enter(job, status)

    def _find(self, job_id: str, verb: str | None = None) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise QMPError("Job not found")
        if verb is not None:
            check_verb(job_id, job.status, verb)
        return job

    def _enter(self, job: Job, status: str) -> None:
        job.status = status
        self._bus.emit("JOB_STATUS_CHANGE", {"status": status, "id": job.id})

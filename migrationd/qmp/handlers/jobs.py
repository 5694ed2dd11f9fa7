"""Jobs, and snapshots, which are jobs."""

from collections.abc import Awaitable, Callable, Sequence

from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.models import jobs as models


def query_jobs(call: Invocation, _: object) -> list[models.JobInfo]:
    """``query-jobs``."""
    return [
        models.JobInfo.make(
            id=job.id,
            type=job.type,
            status=job.status,
            current_progress=job.done,
            total_progress=1,
            error=job.error,
        )
        for job in call.control.machine.jobs.list()
    ]


def job_cancel(call: Invocation, arguments: models.JobId) -> None:
    """``job-cancel``."""
    call.control.machine.jobs.cancel(arguments.id)


def job_pause(call: Invocation, arguments: models.JobId) -> None:
    """``job-pause``."""
    call.control.machine.jobs.pause(arguments.id)


def job_resume(call: Invocation, arguments: models.JobId) -> None:
    """``job-resume``."""
    call.control.machine.jobs.resume(arguments.id)


def job_complete(call: Invocation, arguments: models.JobId) -> None:
    """``job-complete``."""
    call.control.machine.jobs.complete(arguments.id)


def job_finalize(call: Invocation, arguments: models.JobId) -> None:
    """``job-finalize``."""
    call.control.machine.jobs.finalize(arguments.id)


def job_dismiss(call: Invocation, arguments: models.JobId) -> None:
    """``job-dismiss``."""
    call.control.machine.jobs.dismiss(arguments.id)


def snapshot_save(call: Invocation, arguments: models.SnapshotSave) -> None:
    """``snapshot-save``: the result comes by ``query-jobs``."""
    _start(call, arguments, "snapshot-save", call.control.machine.snapshots.save, arguments.vmstate)


def snapshot_load(call: Invocation, arguments: models.SnapshotSave) -> None:
    """``snapshot-load``: the result comes by ``query-jobs``."""
    _start(call, arguments, "snapshot-load", call.control.machine.snapshots.load, arguments.vmstate)


def snapshot_delete(call: Invocation, arguments: models.SnapshotDelete) -> None:
    """``snapshot-delete``: the result comes by ``query-jobs``."""
    _start(call, arguments, "snapshot-delete", call.control.machine.snapshots.delete)


def _start(
    call: Invocation,
    arguments: models.SnapshotSave | models.SnapshotDelete,
    job_type: str,
    act: Callable[[str], Awaitable[None]],
    vmstate: str | None = None,
) -> None:
    machine = call.control.machine
    devices: Sequence[str] = arguments.devices

    async def work() -> None:
        machine.snapshots.check_nodes(devices, vmstate)
        await act(arguments.tag)

    machine.jobs.start(arguments.job_id, job_type, work)


COMMANDS: tuple[CommandSpec, ...] = (
    command("query-jobs", query_jobs, returns=list[models.JobInfo]),
    command("job-cancel", job_cancel, models.JobId),
    command("job-pause", job_pause, models.JobId),
    command("job-resume", job_resume, models.JobId),
    command("job-complete", job_complete, models.JobId),
    command("job-finalize", job_finalize, models.JobId),
    command("job-dismiss", job_dismiss, models.JobId),
    command("snapshot-save", snapshot_save, models.SnapshotSave),
    command("snapshot-load", snapshot_load, models.SnapshotSave),
    command("snapshot-delete", snapshot_delete, models.SnapshotDelete),
)

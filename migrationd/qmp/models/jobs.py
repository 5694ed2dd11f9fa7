"""Jobs and snapshots."""

from typing import Literal

from migrationd.qmp.models.base import QapiModel, optional

JobType = Literal[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
]

JobStatus = Literal[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]


class JobId(QapiModel):
    """Arguments of the ``job-`` commands."""

    id: str


class JobInfo(QapiModel):
    """One entry of ``query-jobs``."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str = optional()


class JobStatusChangeEvent(QapiModel):
    """Data of the JOB_STATUS_CHANGE event."""

    id: str
    status: JobStatus


class SnapshotSave(QapiModel):
    """Arguments of ``snapshot-save`` and ``snapshot-load``."""

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]


class SnapshotDelete(QapiModel):
    """Arguments of ``snapshot-delete``."""

    job_id: str
    tag: str
    devices: list[str]

"""The one table of job statuses: which verb a job takes in which status. Pure.

Reference: texts and tables of QEMU 11.1's jobs.
"""

from migrationd.errors import QMPError

_UNFINISHED = frozenset(("created", "running", "paused", "ready", "standby"))

VERBS: dict[str, frozenset[str]] = {
    "cancel": _UNFINISHED | {"waiting", "pending"},
    "pause": _UNFINISHED,
    "resume": _UNFINISHED,
    "complete": frozenset(("ready",)),
    "finalize": frozenset(("pending",)),
    "dismiss": frozenset(("concluded",)),
}
"""Verb to the statuses in which a job takes it."""

SUCCESS = ("waiting", "pending", "concluded")
"""What follows ``running`` after a success."""

FAILURE = ("aborting", "concluded")
"""What follows ``running`` after a failure or a cancel."""


def check_verb(job_id: str, status: str, verb: str) -> None:
    """Refuse a verb that does not fit.

    Raises:
        QMPError: With QEMU's text.
    """
    if status not in VERBS[verb]:
        raise QMPError(f"Job '{job_id}' in state '{status}' cannot accept command verb '{verb}'")


def check_job_id(job_id: str) -> None:
    """Refuse what is no identifier: a letter, then letters, digits, ``-``, ``.``, ``_``.

    Raises:
        QMPError: With QEMU's text.
    """
    rest = job_id[1:].replace("-", "").replace(".", "").replace("_", "")
    if not (job_id.isascii() and job_id[:1].isalpha() and (not rest or rest.isalnum())):
        raise QMPError(f"Invalid job ID '{job_id}'")

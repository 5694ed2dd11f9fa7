"""The table of statuses."""

import pytest

from migrationd.errors import InvalidState
from migrationd.migration.status import TRANSITIONS, Cause, Role, StatusMachine


def walk(role: Role, *causes: Cause) -> list[str]:
    """Statuses that a row of causes leads through."""
    seen: list[str] = []
    machine = StatusMachine(role, seen.append)
    for cause in causes:
        machine.advance(cause)
    return seen


def test_precopy_of_a_stopped_guest_follows_the_order_of_qemu_11_1() -> None:
    assert walk(Role.OUTGOING, Cause.START, Cause.STREAM, Cause.SWITCHOVER, Cause.COMPLETE) == [
        "setup",
        "active",
        "device",
        "completed",
    ]


def test_pause_before_switchover() -> None:
    assert walk(
        Role.OUTGOING,
        Cause.START,
        Cause.STREAM,
        Cause.PAUSE_BEFORE_SWITCHOVER,
        Cause.SWITCHOVER,
        Cause.COMPLETE,
    ) == ["setup", "active", "pre-switchover", "device", "completed"]


def test_failure_passes_through_failing() -> None:
    assert walk(Role.OUTGOING, Cause.START, Cause.FAIL, Cause.CLEANED_UP) == [
        "setup",
        "failing",
        "failed",
    ]


@pytest.mark.parametrize("depth", range(1, 4))
def test_cancel_from_every_running_status(depth: int) -> None:
    causes = (Cause.START, Cause.STREAM, Cause.SWITCHOVER)[:depth]
    assert walk(Role.OUTGOING, *causes, Cause.CANCEL, Cause.CLEANED_UP)[-2:] == [
        "cancelling",
        "cancelled",
    ]


def test_shut_that_crosses_a_cancel_completes() -> None:
    causes = (Cause.START, Cause.STREAM, Cause.SWITCHOVER, Cause.CANCEL, Cause.COMPLETE)
    assert walk(Role.OUTGOING, *causes)[-1] == "completed"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_a_new_migration_may_follow_each_end(end: str) -> None:
    assert TRANSITIONS[Role.OUTGOING][end, Cause.START] == "setup"


def test_incoming_fails_at_once_and_never_starts_again() -> None:
    assert walk(Role.INCOMING, Cause.START, Cause.STREAM, Cause.FAIL) == [
        "setup",
        "active",
        "failed",
    ]
    machine = StatusMachine(Role.INCOMING, lambda status: None)
    for cause in (Cause.START, Cause.FAIL):
        machine.advance(cause)
    with pytest.raises(InvalidState, match="failed"):
        machine.advance(Cause.START)


def test_running_covers_cancelling_and_failing() -> None:
    machine = StatusMachine(Role.OUTGOING, lambda status: None)
    assert not machine.is_running
    for cause in (Cause.START, Cause.FAIL):
        machine.advance(cause)
        assert machine.is_running
    machine.advance(Cause.CLEANED_UP)
    assert not machine.is_running

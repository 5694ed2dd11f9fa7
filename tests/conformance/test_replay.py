"""Recorded scenarios of QEMU 11.1, played against migrationd."""

from pathlib import Path

import pytest

from migrationd.ctl.qemu_process import find_qemu
from tests.conformance import replay_report as report
from tests.conformance.replay_compare import read
from tests.conformance.replay_differences import NOT_APPLICABLE

QUICK = ("precopy_tcp", "cancel_pre_switchover", "incoming_garbage", "incoming_defer", "colo_xen")
"""Played in every run; they take seconds."""


@pytest.mark.parametrize("scenario", QUICK)
def test_a_scenario_is_as_recorded(scenario: str, tmp_path: Path) -> None:
    outcome = report.judge("11.1", scenario, report.play(scenario, tmp_path))
    assert outcome.verdict == "identical", outcome.found


@pytest.mark.matrix
@pytest.mark.timeout(200)
@pytest.mark.parametrize("scenario", [n for n in report.scenarios("11.1") if n not in QUICK])
def test_no_scenario_differs_without_a_reason(scenario: str, tmp_path: Path) -> None:
    if scenario in NOT_APPLICABLE:
        pytest.skip(NOT_APPLICABLE[scenario])
    outcome = report.judge("11.1", scenario, report.play(scenario, tmp_path))
    assert not outcome.is_unexplained, outcome.found
    assert not outcome.stale


@pytest.mark.matrix
@pytest.mark.timeout(200)
@pytest.mark.parametrize("role", ["src", "dst"])
def test_libvirts_order_of_commands_with_a_real_qemu(role: str, tmp_path: Path) -> None:
    qemu = find_qemu("11.1")
    if qemu is None:
        pytest.skip("no QEMU 11.1")
    ours = report.launcher("parked", "--qemu", str(qemu))
    pair = {"source": str(qemu), "destination": str(qemu)}
    pair["source" if role == "src" else "destination"] = ours
    name = "libvirt_outgoing_precopy"
    played = read(report.play(name, tmp_path, **pair))
    golden = read(report.RECORDINGS / "11.1" / f"{name}.jsonl")
    for key, dialogue in played.items():
        migration = [event for event in dialogue.events if event.startswith("MIGRATION {")]
        assert migration == [e for e in golden[key].events if e.startswith("MIGRATION {")]
    here = played[role, 0]
    assert not [text for replies in here.replies for text in replies if '"error"' in text]


def test_what_is_compared_is_not_too_little() -> None:
    """A recording of another release is told from that of 11.1."""
    for scenario in ("precopy_tcp", "params_invalid", "proto_bad_json"):
        old = report.RECORDINGS / "7.2" / f"{scenario}.jsonl"
        assert report.judge("11.1", scenario, old).found
        new = report.RECORDINGS / "11.1" / f"{scenario}.jsonl"
        assert not report.judge("11.1", scenario, new).found

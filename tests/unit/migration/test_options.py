"""Capabilities and parameters are set all or nothing."""

import pytest

from migrationd.errors import QMPError
from migrationd.migration.options import CAPABILITIES, PARAMETERS, MigrationOptions


def test_defaults_are_those_of_qemu_11_1() -> None:
    options = MigrationOptions()
    assert len(CAPABILITIES) == 21
    assert len(PARAMETERS) == 31
    assert sum(value is not None for value in options.parameters.values()) == 30
    assert not any(options.capabilities.values())
    assert options.parameters["max-bandwidth"] == 134217728
    assert options.parameters["downtime-limit"] == 300


def test_the_last_entry_for_a_capability_wins() -> None:
    options = MigrationOptions()
    options.set_capabilities([("events", True), ("events", False), ("return-path", True)])
    assert not options.capabilities["events"]
    assert options.capabilities["return-path"]


def test_a_refused_capability_leaves_no_trace() -> None:
    options = MigrationOptions()
    with pytest.raises(QMPError, match="requires capability 'return-path'"):
        options.set_capabilities([("events", True), ("switchover-ack", True)])
    assert not options.capabilities["events"]


def test_turning_off_a_needed_capability_is_refused() -> None:
    options = MigrationOptions()
    options.set_capabilities([("return-path", True), ("switchover-ack", True)])
    with pytest.raises(QMPError, match="requires capability 'return-path'"):
        options.set_capabilities([("return-path", False)])


def test_of_several_conflicts_the_one_is_told_that_qemu_finds_first() -> None:
    options = MigrationOptions()
    with pytest.raises(QMPError, match="'x-colo' requires capability 'return-path'"):
        options.set_capabilities([("x-colo", True), ("background-snapshot", True)])


@pytest.mark.parametrize(
    ("one", "other"),
    [("mapped-ram", "x-ignore-shared"), ("multifd", "x-colo"), ("mapped-ram", "x-colo")],
)
def test_what_is_not_built_together_says_so(one: str, other: str) -> None:
    options = MigrationOptions()
    options.set_capabilities([("return-path", True), (one, True), (other, True)])
    text = f"{one.capitalize()} with {other} is not supported"
    with pytest.raises(QMPError, match=text):
        options.check_built()
    options.set_capabilities([(other, False)])
    options.check_built()


def test_what_is_not_built_says_so() -> None:
    options = MigrationOptions()
    options.check_built()
    options.set_capabilities([("rdma-pin-all", True)])
    with pytest.raises(QMPError, match="'rdma-pin-all' is not supported in this version"):
        options.check_built()
    options.set_capabilities([("rdma-pin-all", False)])
    options.check_built()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"announce-step": 0}, "Option announce-step expects a value between 0 and 10000"),
        (
            {"downtime-limit": 2000001},
            r"expects an integer in the range of 0 to \(2000 \* 1000\) ms",
        ),
        ({"xbzrle-cache-size": 4097}, "expects a power of two no less than the target page size"),
        ({"cpu-throttle-initial": 50, "max-cpu-throttle": 40}, "max-cpu-throttle expects"),
        ({"vcpu-dirty-limit": 0}, "must be greater than 1 MB/s"),
    ],
)
def test_ranges(changes: dict[str, int], text: str) -> None:
    options = MigrationOptions()
    before = dict(options.parameters)
    with pytest.raises(QMPError, match=text):
        options.set_parameters({"max-bandwidth": 1, **changes})
    assert dict(options.parameters) == before


def test_values_not_given_are_checked_too() -> None:
    options = MigrationOptions()
    options.set_parameters({"max-cpu-throttle": 40})
    with pytest.raises(QMPError, match="max-cpu-throttle expects"):
        options.set_parameters({"cpu-throttle-initial": 50})

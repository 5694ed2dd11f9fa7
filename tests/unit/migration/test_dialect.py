"""The wire dialect follows the machine type's version."""

import pytest

from migrationd.guest.base import SeenOnArrival
from migrationd.migration.dialect import dialect_of, machine_version


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-i440fx-7.2", (7, 2)),
        ("pc-q35-10.0", (10, 0)),
        ("virt-11.1", (11, 1)),
        ("s390-ccw-virtio-9.2", (9, 2)),
        ("microvm", None),
        ("none", None),
        ("pc-i440fx-7.2-custom", None),
    ],
)
def test_machine_version(machine: str, version: tuple[int, int] | None) -> None:
    assert machine_version(machine) == version


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("pc-i440fx-7.2", False), ("pc-q35-9.2", False), ("pc-q35-10.0", True), ("virt-11.1", True)],
)
def test_switchover_start_only_from_10_0(machine: str, expected: bool) -> None:
    assert dialect_of(machine).send_switchover_start is expected


@pytest.mark.parametrize(
    ("machine", "expected"), [("pc-q35-8.1", True), ("pc-q35-11.0", True), ("pc-q35-11.1", False)]
)
def test_switchover_ack_changed_with_11_1(machine: str, expected: bool) -> None:
    assert dialect_of(machine).switchover_ack_at_once is expected


def test_a_machine_without_version_keeps_what_its_stream_had() -> None:
    assert dialect_of("microvm", SeenOnArrival(switchover_start=True)).send_switchover_start
    assert not dialect_of("microvm", SeenOnArrival(switchover_start=False)).send_switchover_start


def test_parts_that_were_absent_stay_absent() -> None:
    dialect = dialect_of(
        None, SeenOnArrival(configuration=False, section_footers=False, vmdescription=False)
    )
    assert not dialect.send_configuration
    assert not dialect.send_section_footers
    assert not dialect.send_vmdescription

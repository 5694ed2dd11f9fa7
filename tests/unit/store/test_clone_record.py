"""Records of clones under way: one holder each, orphans are found, damage is said."""

from pathlib import Path

import pytest

from migrationd.errors import StoreError
from migrationd.store.clone_record import CloneRecord

LAZY = {"preempt": True, "is_loaded": False}


def test_what_a_living_daemon_sends_is_no_orphan(tmp_path: Path) -> None:
    record = CloneRecord.begin(tmp_path, "g*")
    record.write("tcp:there:1", LAZY)
    other = CloneRecord.begin(tmp_path, "g*")
    assert other.path != record.path
    other.write("tcp:elsewhere:1", LAZY)
    assert CloneRecord.find_orphan(tmp_path, "g*") is None
    record.close()
    found = CloneRecord.find_orphan(tmp_path, "g*")
    assert found is not None
    again, sidecar = found
    assert (sidecar.destination, sidecar.lazy) == ("tcp:there:1", LAZY)
    assert CloneRecord.find_orphan(tmp_path, "g*") is None
    again.remove()
    other.remove()
    assert not list(tmp_path.iterdir())


def test_a_daemon_that_died_before_it_wrote_left_nothing(tmp_path: Path) -> None:
    CloneRecord.begin(tmp_path, "g").close()
    assert CloneRecord.find_orphan(tmp_path, "g") is None
    record = CloneRecord.begin(tmp_path, "g")
    assert record.path == tmp_path / "g.clone.0.json"
    record.close()


def test_an_orphans_number_is_not_taken(tmp_path: Path) -> None:
    record = CloneRecord.begin(tmp_path, "g")
    record.write("x", LAZY)
    record.close()
    other = CloneRecord.begin(tmp_path, "g")
    assert other.path == tmp_path / "g.clone.1.json"
    other.close()


def test_records_of_other_names_are_left_alone(tmp_path: Path) -> None:
    record = CloneRecord.begin(tmp_path, "g1")
    record.write("x", LAZY)
    record.close()
    assert CloneRecord.find_orphan(tmp_path, "g?") is None
    assert CloneRecord.find_orphan(tmp_path, "g") is None


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    (tmp_path / "g.clone.0.json").write_text("{")
    with pytest.raises(StoreError, match="not a guest's record"):
        CloneRecord.find_orphan(tmp_path, "g")


def test_a_directory_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        CloneRecord.begin(tmp_path / "missing", "g")

"""Saved states of a guest at rest."""

import os
from pathlib import Path

import pytest

from migrationd.errors import StoreError
from migrationd.store.parked_directory import ParkedDirectory
from migrationd.store.snapshots import Snapshots
from tests.unit.store.guests import begin, commit, fill, store_guest


@pytest.fixture
def directory(tmp_path: Path) -> ParkedDirectory:
    store_guest(tmp_path)
    return ParkedDirectory(tmp_path, "vm1")


def tags(directory: ParkedDirectory) -> list[str]:
    return [snapshot.tag for snapshot in Snapshots(directory).list()]


def inode(directory: ParkedDirectory) -> int:
    saved = directory.find()
    assert saved is not None
    number = os.fstat(saved.fd).st_ino
    os.close(saved.fd)
    return number


def let_another_guest_arrive(directory: ParkedDirectory) -> None:
    directory.record_owner("handed-over", "tcp:there:1")
    new = begin(directory, "pc-q35-10.0")
    fill(new)
    commit(new)


def test_a_state_is_saved_taken_up_and_removed(directory: ParkedDirectory) -> None:
    snapshots = Snapshots(directory)
    first = inode(directory)
    directory.record_run_state("running")
    snapshots.save("before the update/1.0")
    assert tags(directory) == ["before the update/1.0"]
    let_another_guest_arrive(directory)
    assert inode(directory) != first
    directory.record_run_state("paused")
    snapshots.load("before the update/1.0")
    saved = directory.find()
    assert saved is not None
    assert os.fstat(saved.fd).st_ino == first
    assert saved.contents.configuration.machine == "pc-i440fx-10.0"
    assert (saved.sidecar.owner, saved.sidecar.run_state) == ("held", "running")
    os.close(saved.fd)
    snapshots.delete("before the update/1.0")
    snapshots.delete("before the update/1.0")
    assert tags(directory) == []
    assert inode(directory) == first


def test_a_state_of_a_guest_that_has_left_is_ours_again(directory: ParkedDirectory) -> None:
    Snapshots(directory).save("a")
    directory.record_owner("handed-over", "tcp:there:1")
    Snapshots(directory).load("a")
    assert directory.recorded().owner == "held"
    assert directory.recorded().destination is None


def test_another_daemon_finds_the_states(directory: ParkedDirectory, tmp_path: Path) -> None:
    for tag in ("b", "a"):
        Snapshots(directory).save(tag)
    directory.close()
    again = ParkedDirectory(tmp_path, "vm1")
    assert sorted(tags(again)) == ["a", "b"]
    assert all(snapshot.size_bytes > 0 for snapshot in Snapshots(again).list())


def test_tags_that_cannot_be(directory: ParkedDirectory) -> None:
    snapshots = Snapshots(directory)
    snapshots.save("one")
    with pytest.raises(StoreError, match="Snapshot 'one' already exists in one or more devices"):
        snapshots.save("one")
    with pytest.raises(StoreError, match="Snapshot 'two' does not exist in one or more devices"):
        snapshots.load("two")
    for tag in ("", "x" * 201):
        with pytest.raises(StoreError, match="tag has 1 to 200"):
            snapshots.save(tag)
    snapshots.save("../../escape")
    assert sorted(tags(directory)) == ["../../escape", "one"]


def test_nothing_to_save(tmp_path: Path) -> None:
    directory = ParkedDirectory(tmp_path, "vm1")
    with pytest.raises(StoreError, match="no guest at rest"):
        Snapshots(directory).save("a")
    assert tags(directory) == []


def test_a_state_that_cannot_be_read_takes_nobodys_place(
    directory: ParkedDirectory, tmp_path: Path
) -> None:
    snapshots = Snapshots(directory)
    snapshots.save("bad")
    let_another_guest_arrive(directory)
    there = inode(directory)
    (file,) = (tmp_path / "vm1.snapshots").glob("*.mapped-ram")
    file.write_bytes(b"no guest")
    with pytest.raises(StoreError):
        snapshots.load("bad")
    assert inode(directory) == there


def test_the_guest_stays_if_the_disk_is_too_full_for_the_record_of_another_one(
    directory: ParkedDirectory, tmp_path: Path
) -> None:
    snapshots = Snapshots(directory)
    snapshots.save("first")
    let_another_guest_arrive(directory)
    second = inode(directory)
    (tmp_path / "vm1.json.part").mkdir()
    with pytest.raises(StoreError, match="Is a directory"):
        snapshots.load("first")
    assert inode(directory) == second
    (tmp_path / "vm1.json.part").rmdir()
    snapshots.load("first")
    assert inode(directory) != second

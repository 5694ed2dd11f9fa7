import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from migrationd.errors import StoreError
from migrationd.store import parked_directory
from migrationd.store.mapped_ram_reader import read_bitmap
from migrationd.store.parked_directory import ParkedDirectory, SavedGuest
from migrationd.store.sidecar import write_sidecar
from tests.unit.store.guests import (
    BLOCKS,
    EARLY,
    LATE,
    begin,
    commit,
    fill,
    present_pages,
    section,
    store_guest,
)


@pytest.fixture
def directory(tmp_path: Path) -> ParkedDirectory:
    return ParkedDirectory(tmp_path / "ram", "vm1")


def found(directory: ParkedDirectory) -> SavedGuest:
    saved = directory.find()
    assert saved is not None
    os.close(saved.fd)
    return saved


def test_an_empty_directory_holds_no_guest(directory: ParkedDirectory) -> None:
    assert directory.find() is None


def test_a_guest_is_found_again_by_another_daemon(tmp_path: Path) -> None:
    store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm1")
    saved = directory.find()
    assert saved is not None
    assert saved.sidecar.owner == "held"
    assert saved.sidecar.seen == {"section_footers": True}
    assert saved.contents.early == EARLY
    assert saved.contents.late == LATE
    for block, present in zip(saved.contents.blocks, present_pages(), strict=True):
        assert (read_bitmap(saved.fd, block) == present).all()
    os.close(saved.fd)
    directory.close()


def test_a_guest_that_is_still_arriving_is_not_there(tmp_path: Path) -> None:
    directory = ParkedDirectory(tmp_path, "vm1")
    new = begin(directory)
    fill(new)
    assert directory.find() is None
    new.abandon()
    os.close(new.fd)
    assert directory.find() is None
    assert sorted(os.listdir(tmp_path)) == ["vm1.lock"]


def test_what_a_daemon_left_that_died_while_a_guest_arrived_is_removed(tmp_path: Path) -> None:
    (tmp_path / "vm1.mapped-ram.part").write_bytes(b"half")
    directory = ParkedDirectory(tmp_path, "vm1")
    assert directory.find() is None
    assert not (tmp_path / "vm1.mapped-ram.part").exists()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    store_guest(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "new").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_zero_pages_take_no_disk_space(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    present = sum(int(bools.sum()) for bools in present_pages())
    assert path.stat().st_blocks * 512 < (present + 40) * 4096


def test_changes_of_the_record_are_there_after_a_restart(tmp_path: Path) -> None:
    store_guest(tmp_path)
    for owner, destination in (
        ("handing-over", "tcp:b:4444"),
        ("handed-over", "tcp:b:4444"),
        ("held", None),
    ):
        directory = ParkedDirectory(tmp_path, "vm1")
        directory.record_owner(owner, destination)
        directory.close()
        directory = ParkedDirectory(tmp_path, "vm1")
        sidecar = found(directory).sidecar
        assert (sidecar.owner, sidecar.destination) == (owner, destination)
        directory.close()
    directory = ParkedDirectory(tmp_path, "vm1")
    directory.record_run_state("paused")
    directory.record_owner("handing-over", "unix:/b")
    sidecar = found(directory).sidecar
    assert (sidecar.run_state, sidecar.owner) == ("paused", "handing-over")
    assert sidecar.seen == {"section_footers": True}


def test_one_name_has_one_daemon(directory: ParkedDirectory, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"process {os.getpid()} holds guest 'vm1'"):
        ParkedDirectory(tmp_path / "ram", "vm1")
    other = ParkedDirectory(tmp_path / "ram", "vm2")
    other.close()
    directory.close()
    directory.close()
    ParkedDirectory(tmp_path / "ram", "vm1").close()


@pytest.mark.parametrize("owner", ["held", "handing-over"])
def test_a_guest_that_was_not_handed_over_is_never_replaced(tmp_path: Path, owner: str) -> None:
    path = store_guest(tmp_path)
    before = path.read_bytes()
    directory = ParkedDirectory(tmp_path, "vm1")
    directory.record_owner(owner, None)
    with pytest.raises(StoreError, match="guest 'vm1' rests in"):
        begin(directory)
    assert path.read_bytes() == before


def test_a_guest_that_was_handed_over_is_replaced_when_the_next_one_is_whole(
    tmp_path: Path,
) -> None:
    store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm1")
    directory.record_owner("handed-over", "tcp:b:1")
    new = begin(directory, "pc-q35-11.1")
    fill(new)
    assert found(directory).contents.configuration.machine == "pc-i440fx-10.0"
    commit(new)
    saved = found(directory)
    assert saved.contents.configuration.machine == "pc-q35-11.1"
    assert (saved.sidecar.owner, saved.sidecar.destination) == ("held", None)


def test_a_file_without_a_record_is_a_held_guest(tmp_path: Path) -> None:
    path = store_guest(tmp_path, "from-qemu")
    (tmp_path / "from-qemu.json").unlink()
    path.rename(tmp_path / "vm1.mapped-ram")
    directory = ParkedDirectory(tmp_path, "vm1")
    saved = found(directory)
    assert (saved.sidecar.owner, saved.sidecar.seen) == ("held", {})
    directory.record_owner("handing-over", "tcp:b:1")
    assert found(directory).sidecar.owner == "handing-over"


def test_a_file_that_is_not_the_one_of_its_record_is_refused(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"running")
    data[at : at + 7] = b"stopped"
    path.write_bytes(data)
    with pytest.raises(StoreError, match="was changed, or is not the file"):
        ParkedDirectory(tmp_path, "vm1").find()


def test_a_changed_bitmap_is_noticed(tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm1")
    position = found(directory).contents.blocks[0].bitmap_position
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(b"\xff")
    with pytest.raises(StoreError, match="was changed"):
        directory.find()


def test_the_record_of_another_guest_is_refused(tmp_path: Path) -> None:
    store_guest(tmp_path, "vm2")
    for suffix in ("mapped-ram", "json"):
        (tmp_path / f"vm2.{suffix}").rename(tmp_path / f"vm1.{suffix}")
    with pytest.raises(StoreError, match="record of guest 'vm2'"):
        ParkedDirectory(tmp_path, "vm1").find()


def test_a_section_that_would_not_read_back_is_not_stored(directory: ParkedDirectory) -> None:
    new = begin(directory)
    # Looks like the end of its section with another one behind it.
    footer = b"\x7e\0\0\0\x09"
    fake = b"\x04\0\0\0\x0a\x03rtc\0\0\0\0\0\0\0\x01xx" + b"\x7e\0\0\0\x0a"
    with pytest.raises(StoreError):
        new.commit(
            present_pages(),
            [section("cpu", b"ab" + footer + fake + b"\x04\0\0\0\x09\x01a", section_id=9)],
            b"{}",
            switchover_start=False,
            seen={},
        )
    new.abandon()
    os.close(new.fd)
    assert directory.find() is None


def test_a_directory_that_is_made_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(parked_directory, "sync_directory", synced.append)
    ParkedDirectory(tmp_path / "a" / "b", "vm1").close()
    ParkedDirectory(tmp_path / "a" / "b", "vm1").close()
    assert synced == [tmp_path, tmp_path / "a"]


class Died(BaseException):
    """Stands for the end of the process."""


def crash_points() -> list[str]:
    return ["fsync", "unlink", "rename", "sync_directory", "write_sidecar"]


@pytest.mark.parametrize("call", crash_points())
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_crash_while_a_guest_is_put_in_place_leaves_no_guest_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: bool, nth: int
) -> None:
    store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm1")
    directory.record_owner("handed-over", "tcp:b:1")
    new = begin(directory, "pc-q35-11.1")
    fill(new)
    module = parked_directory if call in ("sync_directory", "write_sidecar") else os
    real = getattr(module, call)
    calls = 0

    def die(*arguments: object, **options: object) -> object:
        nonlocal calls
        if threading.current_thread() is not threading.main_thread():
            return real(*arguments, **options)
        calls += 1
        if calls == nth and not after:
            raise Died
        result = real(*arguments, **options)
        if calls == nth:
            raise Died
        return result

    died = True
    with monkeypatch.context() as patch:
        patch.setattr(module, call, die)
        try:
            commit(new)
            died = False
        except Died:
            os.close(new.fd)
    directory.close()

    directory = ParkedDirectory(tmp_path, "vm1")
    saved = directory.find()
    if saved is not None:
        os.close(saved.fd)
        old = saved.contents.configuration.machine == "pc-i440fx-10.0"
        assert saved.sidecar.owner == ("handed-over" if old else "held")
        assert [(b.idstr, b.used_length) for b in saved.contents.blocks] == list(BLOCKS)
    if not died:
        assert saved is not None
        assert saved.contents.configuration.machine == "pc-q35-11.1"
    # Whatever was left, the next guest can come.
    if saved is None or saved.sidecar.owner == "handed-over":
        commit(begin(directory))
        assert found(directory).sidecar.owner == "held"


def test_a_record_that_cannot_be_written_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parked_directory, "write_sidecar", full)
    with pytest.raises(StoreError, match="No space left on device"):
        directory.record_owner("handing-over", "tcp:b:1")
    monkeypatch.setattr(parked_directory, "write_sidecar", write_sidecar)
    assert found(directory).sidecar.owner == "held"


def test_a_full_disk_while_committing_is_a_store_error(
    directory: ParkedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = begin(directory)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="cannot be stored: No space left"):
            commit(new)
    new.abandon()
    os.close(new.fd)
    assert directory.find() is None


def test_a_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"-ram-dir '.*file'"):
        ParkedDirectory(tmp_path / "file", "vm1")


def _hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    ParkedDirectory(path, "vm1")
    ready.set()
    threading.Event().wait()


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready), daemon=True)
    holder.start()
    assert ready.wait(20)
    with pytest.raises(StoreError, match=f"process {holder.pid} holds"):
        ParkedDirectory(tmp_path, "vm1")
    holder.kill()
    holder.join()
    ParkedDirectory(tmp_path, "vm1").close()


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    store_guest(tmp_path)
    directory = ParkedDirectory(tmp_path, "vm2")
    new = begin(directory)
    new.abandon()
    new.abandon()
    os.close(new.fd)
    assert threading.active_count() == before


@pytest.mark.parametrize("suffix", ["mapped-ram", "json"])
def test_nobody_waits_for_the_other_end_of_a_fifo(suffix: str, tmp_path: Path) -> None:
    path = store_guest(tmp_path)
    path.with_suffix(f".{suffix}").unlink()
    os.mkfifo(path.with_suffix(f".{suffix}"))
    with pytest.raises(StoreError, match=rf"vm1\.{suffix}' is n"):
        found(ParkedDirectory(tmp_path, "vm1"))


def test_an_unfinished_guest_that_cannot_be_removed_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "vm1.mapped-ram.part").mkdir()
    with pytest.raises(StoreError, match=r"vm1\.mapped-ram\.part': Is a directory"):
        ParkedDirectory(tmp_path, "vm1")


def test_a_full_disk_does_not_keep_a_guest_from_being_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_guest(tmp_path)

    def no_room(fd: int, data: bytes, position: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", no_room)
    found(ParkedDirectory(tmp_path, "vm1"))

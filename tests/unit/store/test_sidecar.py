import json
import os
from pathlib import Path

import pytest

from migrationd.errors import StoreError
from migrationd.guest.run_state import Owner
from migrationd.store.sidecar import OWNERS, SIDECAR_VERSION, Sidecar, read_sidecar, write_sidecar

FULL = Sidecar(
    "vm1", "handed-over", "tcp:b:4444", "paused", {"configuration": True}, 12345, 0xDEADBEEF
)


def test_the_owners_on_record_are_those_of_a_guest() -> None:
    assert set(OWNERS) == {owner.value for owner in Owner}


HUGE = Sidecar("vm1", page_sizes={"ram0": 2 << 20})
LAZY = Sidecar("vm1", "handing-over", lazy={"preempt": True, "is_loaded": False})


@pytest.mark.parametrize("sidecar", [FULL, LAZY, HUGE, Sidecar("vm1")])
def test_a_sidecar_reads_back(tmp_path: Path, sidecar: Sidecar) -> None:
    path = tmp_path / "vm1.json"
    write_sidecar(path, sidecar)
    assert read_sidecar(path) == sidecar
    assert os.listdir(tmp_path) == ["vm1.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path / "none.json") is None


def test_a_write_replaces_the_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "vm1.json"
    write_sidecar(path, FULL)
    write_sidecar(path, Sidecar("b"))
    assert read_sidecar(path) == Sidecar("b")


def record(**changes: object) -> bytes:
    return json.dumps(
        {"version": SIDECAR_VERSION, "name": "a", "owner": "held", **changes}
    ).encode()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a guest's record"),
        (b"\xff\xfe{}", "not a guest's record"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "not a guest's record"),
        (b" " * (1 << 21), "more than 1048576 bytes"),
        (record(version=2), "version 2, only 1 is known"),
        (record(owner="nobody"), "owner 'nobody', expected one of held"),
        (record(owner=["held"]), "owner"),
        (record(name=7), "'name' is 7, expected str"),
        (record(seen=[1]), "'seen' is"),
        (record(seen={"a": "yes"}), "'seen' holds other values"),
        (record(run_state=1), "'run_state'"),
        (record(destination={}), "'destination'"),
        (record(file_bytes="many"), "'file_bytes'"),
        (record(page_sizes=[4096]), "'page_sizes' is"),
        (record(page_sizes={"ram0": 12345}), "no page size"),
        (record(page_sizes={"ram0": True}), "no page size"),
        (record(page_sizes={"ram0": 1 << 60}), "no page size"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "vm1.json"
    path.write_bytes(raw)
    with pytest.raises(StoreError, match=message):
        read_sidecar(path)


def test_a_sidecar_that_cannot_be_read_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Is a directory"):
        read_sidecar(tmp_path)

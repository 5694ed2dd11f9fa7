"""Which versions of a workload can migrate into which."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from migrationd.errors import GuestError
from migrationd.workload import (
    VMState,
    array,
    buffer,
    struct,
    subsection,
    u8,
    u16,
    u32,
    u64,
    varray,
)
from migrationd.workload.compare import main, problems

V1 = VMState("dev", version_id=1, fields=(u64("a"),))
V2 = VMState("dev", version_id=2, minimum_version_id=1, fields=(u64("a"), u32("b", since=2)))


def one(state: VMState) -> list[dict[str, object]]:
    return [state.declaration()]


def test_a_newer_version_takes_an_older_one_but_not_the_reverse() -> None:
    assert problems(one(V1), one(V2)) == []
    assert problems(one(V2), one(V1)) == [
        "device 'dev': version_id 2 is too new for the destination's 1"
    ]


@pytest.mark.parametrize(
    ("source", "destination", "text"),
    [
        (VMState("dev", fields=(u32("a"),)), V1, "field 'a': type uint32 is uint64"),
        (VMState("dev", fields=(u64("x"),)), V1, "field 'x' stands where the destination has 'a'"),
        (VMState("dev"), V1, "field 'a' does not exist at the source"),
        (
            VMState("dev", fields=(u64("a"), u64("z"))),
            V1,
            "field 'z' does not exist at the destination",
        ),
        (
            VMState("dev", fields=(array(u64("a"), 3),)),
            VMState("dev", fields=(array(u64("a"), 4),)),
            "field 'a': length 3 is 4 there",
        ),
        (
            VMState("dev", fields=(struct("s", VMState("in", fields=(u32("q"),))),)),
            VMState("dev", fields=(struct("s", VMState("in", fields=(u64("q"),))),)),
            "field 's': field 'q': type uint32 is uint64",
        ),
        (
            VMState("dev", subsections=(subsection("dev/s", needed=bool, fields=()),)),
            VMState("dev"),
            "subsection 'dev/s' is not known",
        ),
        (
            VMState("dev", fields=(array(u64("a"), 1),)),
            V1,
            "field 'a': length 1 is None there",
        ),
        (
            VMState("dev", fields=(u8("n"), varray(u64("a"), "n"))),
            VMState("dev", fields=(u8("n"), array(u64("a"), 4))),
            "field 'a': length None is 4 there",
        ),
        (
            VMState("dev", fields=(u64("a", exists=bool),)),
            V1,
            "field 'a': conditional True is None there",
        ),
        (
            VMState("dev", fields=(buffer("a", 8),)),
            V1,
            r"field 'a': type buffer[8] is uint64",
        ),
        (
            VMState("dev", subsections=(subsection("dev/s", needed=bool, fields=(u8("q"),)),)),
            VMState("dev", subsections=(subsection("dev/s", needed=bool, fields=(u16("q"),)),)),
            "subsection 'dev/s': field 'q': type uint8 is uint16",
        ),
        (VMState("dev", unmigratable="it holds a lock"), VMState("dev"), "it holds a lock"),
        (VMState("other"), V1, "device 'other' does not exist at the destination"),
    ],
)
def test_each_difference_is_named(source: VMState, destination: VMState, text: str) -> None:
    found = problems(one(source), one(destination))
    assert len(found) == 1
    assert text in found[0]


INNER_1 = VMState("in", fields=(u32("q"),))
INNER_2 = VMState("in", version_id=2, fields=(u32("q"), u32("r", since=2)))


@pytest.mark.parametrize(("old", "new"), [(INNER_1, INNER_2), (INNER_2, INNER_1)])
def test_a_structure_has_no_version_of_its_own_on_the_wire(old: VMState, new: VMState) -> None:
    """What is said of two declarations is what comes of loading the one into the other."""
    source = VMState("dev", fields=(struct("s", old), u32("end")))
    destination = VMState("dev", fields=(struct("s", new), u32("end")))
    body, _ = source.encode(SimpleNamespace(s=SimpleNamespace(q=1, r=2), end=3))
    there = SimpleNamespace(s=SimpleNamespace(q=0, r=0), end=0)
    with pytest.raises(GuestError):
        destination.decode(body, there, 1)
    [problem] = problems(one(source), one(destination))
    assert "field 's': field 'r' does not exist" in problem


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1],
        [{}],
        [{"name": "dev", "version_id": 1, "minimum_version_id": 1}],
        [{"name": "dev", "version_id": "1", "minimum_version_id": 1, "fields": []}],
        [{"name": "dev", "version_id": 1, "minimum_version_id": 1, "fields": [{"name": "a"}]}],
        [
            {
                "name": "dev",
                "version_id": 1,
                "minimum_version_id": 1,
                "fields": [{"name": "a", "type": ["struct", {}]}],
            }
        ],
    ],
)
def test_what_are_no_declarations(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(value))
    assert main([str(path), str(path)]) == 2
    assert "no list of declarations" in capsys.readouterr().err
    assert problems(cast("list[dict[str, object]]", value), one(V1)) == [
        "what the source has is no list of declarations"
    ]


def test_the_command_compares_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(one(V1)))
    new.write_text(json.dumps(one(V2)))
    assert main([str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "old to new: yes" in out
    assert "new to old: no" in out
    assert main([str(old), str(old)]) == 0
    assert main([str(old), str(tmp_path / "none.json")]) == 2

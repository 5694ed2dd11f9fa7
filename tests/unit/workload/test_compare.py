"""Which versions of a workload can migrate into which."""

import json
from pathlib import Path

import pytest

from migrationd.workload import VMState, array, struct, subsection, u32, u64
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
        (VMState("dev", unmigratable="it holds a lock"), VMState("dev"), "it holds a lock"),
        (VMState("other"), V1, "device 'other' does not exist at the destination"),
    ],
)
def test_each_difference_is_named(source: VMState, destination: VMState, text: str) -> None:
    found = problems(one(source), one(destination))
    assert len(found) == 1
    assert text in found[0]


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

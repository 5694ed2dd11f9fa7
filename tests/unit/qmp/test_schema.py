"""schemas/ is what the models give, and names what clients can use."""

import json
from pathlib import Path

import pytest

from migrationd.qmp import schema
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.events import EVENTS


def test_the_files_are_current() -> None:
    assert schema.main(["--check"]) == 0


def test_a_stale_file_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema.main(["--write", "--directory", str(tmp_path)])
    assert schema.main(["--check", "--directory", str(tmp_path)]) == 0
    (tmp_path / "commands" / "stop.json").write_text("{}")
    assert schema.main(["--check", "--directory", str(tmp_path)]) == 1
    assert "commands/stop.json" in capsys.readouterr().err
    (tmp_path / "commands" / "stop.json").unlink()
    (tmp_path / "left-over.json").write_text("{}")
    assert schema.main(["--check", "--directory", str(tmp_path)]) == 1


def test_every_command_event_and_type_is_there() -> None:
    files = schema.generate()
    index = json.loads(files["index.json"])
    assert set(index["commands"]) == set(COMMANDS)
    assert set(index["events"]) == set(EVENTS)
    types = json.loads(files["types.json"])["$defs"]
    for name, text in files.items():
        if name.startswith("guest/"):
            continue  # each of these is whole by itself
        for reference in find_references(json.loads(text)):
            assert reference.rpartition("/")[2] in types


def find_references(value: object) -> list[str]:
    if isinstance(value, dict):
        found = [item for key, item in value.items() if key == "$ref"]
        return found + [ref for item in value.values() for ref in find_references(item)]
    if isinstance(value, list):
        return [ref for item in value for ref in find_references(item)]
    return []


def test_parameters_carry_unit_range_and_age() -> None:
    types = json.loads(schema.generate()["types.json"])["$defs"]
    limit = types["MigrateSetParameters"]["properties"]["downtime-limit"]
    assert (limit["unit"], limit["maximum"], limit["since"]) == ("ms", 2000000, "2.8")
    assert limit["qapi-type"] == "uint64"
    assert "default" not in limit

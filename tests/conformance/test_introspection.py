"""query-qmp-schema says of each migration command and event what QEMU 11.1's says."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from migrationd.qmp.handlers.introspection import entities
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.introspection import SchemaInfo
from tests.support.introspection import differences, named
from tests.support.results import add_row

RECORDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "introspection" / "11.1.json").read_text("utf-8")
)
OURS = entities(COMMANDS.values())

TABLE = "introspection beside QEMU 11.1's"

DIFFERENCES = {
    "migrate: +detach deprecated": "older tools send it",
}
"""All that differs, and why."""


@pytest.mark.parametrize("name", named(RECORDED))
def test_entity_is_equal(name: str, request: pytest.FixtureRequest) -> None:
    assert name in named(OURS)
    found = list(differences(OURS, RECORDED, name))
    assert [line for line in found if line not in DIFFERENCES] == []
    verdict = "; ".join(f"{line} ({DIFFERENCES[line]})" for line in found) or "equal"
    add_row(request.config, TABLE, (name, verdict))


def test_every_difference_is_still_there() -> None:
    found = {line for name in named(RECORDED) for line in differences(OURS, RECORDED, name)}
    assert found == set(DIFFERENCES)


def test_it_is_what_its_own_type_says() -> None:
    TypeAdapter(list[SchemaInfo]).validate_python(OURS)


def test_every_type_is_described_once_and_all_that_is_named_is_described() -> None:
    names = [item["name"] for item in OURS]
    assert len(names) == len(set(names))
    for item in OURS:
        types = [item.get(key) for key in ("arg-type", "ret-type", "element-type")]
        types += [member.get("type") for member in _list(item, "members")]
        types += [variant["type"] for variant in _list(item, "variants")]
        assert {str(name) for name in types if name is not None} <= set(names)


def _list(item: dict[str, object], key: str) -> list[dict[str, object]]:
    value = item.get(key, [])
    assert isinstance(value, list)
    return value

"""Models to entities, and the comparison that the conformance test rests on."""

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest

from migrationd.errors import QMPError
from migrationd.qmp.handlers.introspection import entities
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.introspect import CommandForm, introspect
from migrationd.qmp.models.base import EnumFeatures, QapiModel, QapiUnion, optional, required
from tests.support.fake_control import FakeControl
from tests.support.introspection import differences
from tests.support.monitor import Monitor

Colour = Annotated[Literal["red", "blue"], EnumFeatures({"blue": ("unstable",)})]


class Shape(QapiModel):
    kind: Literal["dot", "box"]
    label: str = optional(since="1.0")


class Box(QapiModel):
    side_length: int
    colours: list[Colour]


class Arguments(QapiModel):
    amount: float
    old: bool = required(deprecated=True)
    text: str | None = optional(unstable=True)
    shape: Annotated[Shape | Box, QapiUnion(Shape, "kind", {"box": Box})] = optional()
    anything: Any = optional()


def forms(**changes: object) -> list[dict[str, object]]:
    command = replace(CommandForm("paint", Arguments, list[str]), **changes)
    return introspect([command], {"PAINTED": Shape})


def test_every_kind_of_entity() -> None:
    assert forms(features=("unstable",), allows_oob=True) == [
        {
            "name": "paint",
            "ret-type": "[str]",
            "meta-type": "command",
            "arg-type": "1",
            "allow-oob": True,
            "features": ["unstable"],
        },
        {"name": "PAINTED", "meta-type": "event", "arg-type": "2"},
        {"name": "0", "members": [], "meta-type": "object"},
        {
            "name": "1",
            "members": [
                {"name": "amount", "type": "number"},
                {"name": "old", "type": "bool", "features": ["deprecated"]},
                {"name": "text", "default": None, "type": "3", "features": ["unstable"]},
                {"name": "shape", "default": None, "type": "4"},
                {"name": "anything", "default": None, "type": "any"},
            ],
            "meta-type": "object",
        },
        {"name": "[str]", "element-type": "str", "meta-type": "array"},
        {"name": "str", "json-type": "string", "meta-type": "builtin"},
        {
            "name": "2",
            "members": [
                {"name": "kind", "type": "5"},
                {"name": "label", "default": None, "type": "str"},
            ],
            "meta-type": "object",
        },
        {"name": "number", "json-type": "number", "meta-type": "builtin"},
        {"name": "bool", "json-type": "boolean", "meta-type": "builtin"},
        {"name": "3", "members": [{"type": "str"}, {"type": "null"}], "meta-type": "alternate"},
        {
            "name": "4",
            "tag": "kind",
            "variants": [{"case": "dot", "type": "0"}, {"case": "box", "type": "6"}],
            "members": [
                {"name": "kind", "type": "5"},
                {"name": "label", "default": None, "type": "str"},
            ],
            "meta-type": "object",
        },
        {"name": "any", "json-type": "value", "meta-type": "builtin"},
        {
            "name": "5",
            "members": [{"name": "dot"}, {"name": "box"}],
            "meta-type": "enum",
            "values": ["dot", "box"],
        },
        {"name": "null", "json-type": "null", "meta-type": "builtin"},
        {
            "name": "6",
            "members": [
                {"name": "side-length", "type": "int"},
                {"name": "colours", "type": "[7]"},
            ],
            "meta-type": "object",
        },
        {"name": "int", "json-type": "int", "meta-type": "builtin"},
        {"name": "[7]", "element-type": "7", "meta-type": "array"},
        {
            "name": "7",
            "members": [{"name": "red"}, {"name": "blue", "features": ["unstable"]}],
            "meta-type": "enum",
            "values": ["red", "blue"],
        },
    ]


class FewerColours(QapiModel):
    side_length: int
    colours: list[Literal["red"]]


class Changed(QapiModel):
    old: bool
    amount: int
    text: str
    shape: Annotated[Shape | Box, QapiUnion(Shape, "kind", {"box": FewerColours})] = optional()
    more: str


def test_every_difference_is_seen() -> None:
    assert list(differences(forms(), forms(), "paint")) == []
    theirs = forms(arguments=Changed, allows_oob=True, returns=list[int])
    assert list(differences(forms(), theirs, "paint")) == [
        "paint: allow-oob None, not True",
        "paint: -more",
        "paint.amount: json-type number, not int",
        "paint.old: features ['deprecated'], not None",
        "paint.text: features ['unstable'], not None",
        "paint.text: is optional, not required",
        "paint.text: meta-type alternate, not builtin",
        "paint.text: json-type None, not string",
        "paint.shape.box.colours[]: +blue unstable",
        "paint: +anything",
        "paint returns[]: json-type string, not int",
    ]


@pytest.fixture
async def monitor() -> Monitor:
    monitor = Monitor(FakeControl())
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    return monitor


async def test_the_monitor_returns_all_of_it(monitor: Monitor) -> None:
    for _ in range(2):
        (reply,) = await monitor.feed(b'{"execute": "query-qmp-schema", "id": 5}')
        assert reply == {"return": entities(COMMANDS.values()), "id": 5}


async def test_command_line_options(monitor: Monitor) -> None:
    (reply,) = await monitor.feed(b'{"execute": "query-command-line-options"}')
    options = {item["option"]: item for item in reply["return"]}
    assert set(options) == {"chardev", "mon", "name"}
    assert {item["name"] for item in options["mon"]["parameters"]} == {"chardev", "mode", "pretty"}
    option = options["name"]
    assert {item["name"]: item["type"] for item in option["parameters"]} == {
        "guest": "string",
        "process": "string",
        "debug-threads": "boolean",
    }
    ask = {"execute": "query-command-line-options", "arguments": {"option": "incoming"}}
    (reply,) = await monitor.feed(json.dumps(ask).encode())
    assert reply["error"]["desc"] == str(QMPError("invalid option name: incoming"))

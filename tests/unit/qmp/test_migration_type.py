"""The properties of the type ``migration`` are those that QEMU 11.1 lists."""

import json
from pathlib import Path
from typing import Any

from migrationd.qmp.handlers.migration_type import all_properties, device_properties

RECORDED = Path(__file__).parents[2] / "conformance/recordings/11.1/query_qom.jsonl"


def recorded(command: str) -> dict[str, Any]:
    """Properties by name, of the reply to the command about ``migration``."""
    lines = [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]
    asked = next(
        line["msg"]["id"]
        for line in lines
        if line["dir"] == "send"
        and line["msg"]["execute"] == command
        and line["msg"]["arguments"].get("typename") == "migration"
    )
    reply = next(
        line["msg"] for line in lines if line["dir"] == "recv" and line["msg"].get("id") == asked
    )
    return {item["name"]: item for item in reply["return"]}


def test_all_properties() -> None:
    ours = [item.model_dump(by_alias=True, exclude_unset=True) for item in all_properties()]
    assert {item["name"]: item for item in ours} == recorded("qom-list-properties")


def test_properties_of_the_device() -> None:
    ours = [item.model_dump(by_alias=True, exclude_unset=True) for item in device_properties()]
    assert {item["name"]: item for item in ours} == recorded("device-list-properties")

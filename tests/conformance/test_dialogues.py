"""The monitor answers as a real QEMU 11.1 did, in recorded dialogues."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrationd.qmp.handlers import legacy
from tests.support.fake_control import FakeChardev, FakeControl
from tests.support.monitor import Monitor
from tests.support.results import add_row

DIRECTORY = Path(__file__).parent / "dialogues"
TABLE = "recorded monitor dialogues, QEMU 11.1"

NEEDS_ENGINE = ("File descriptor named", "Could not create", "RDMA ERROR")
"""Refusals of ``migrate`` that come from opening the channel."""

Exchange = tuple[bytes, list[dict[str, Any]]]


def exchanges(name: str) -> Iterator[Exchange]:
    """What was sent, and all that came back before the next was sent."""
    sent: bytes | None = None
    replies: list[dict[str, Any]] = []
    for line in (DIRECTORY / f"{name}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if "recv" in record:
            if sent is not None:
                replies.append(record["recv"])
            continue
        if sent is not None:
            yield sent, replies
        replies = []
        if "raw" in record:
            sent = record["raw"].encode("latin-1")
        else:
            sent = json.dumps(record["send"]).encode() + b"\n"
    if sent is not None:
        yield sent, replies


def is_expected(sent: bytes, golden: dict[str, Any], reply: dict[str, Any]) -> bool:
    """Whether a difference is none of the monitor's rules."""
    if reply.get("error", {}).get("class") == "CommandNotFound":
        return "has not been found" not in golden.get("error", {}).get("desc", "")
    text = golden.get("error", {}).get("desc", "")
    if any(spec.name.encode() in sent for spec in legacy.COMMANDS):
        return "has not been found" in text  # here they are still taken, for older tools
    if b'"execute": "migrate"' in sent:
        # QEMU 11 has dropped "detach"; here it is still taken, for older tools.
        return "detach" in text or any(part in text for part in NEEDS_ENGINE)
    return b"query-migrate" in sent or b"query-kvm" in sent


@pytest.mark.parametrize("name", sorted(path.stem for path in DIRECTORY.glob("*.jsonl")))
async def test_replies_are_those_of_qemu(name: str, request: pytest.FixtureRequest) -> None:
    control = FakeControl()
    control.machine.devices["compat_monitor0"] = FakeChardev()
    if name.endswith("_incoming"):
        control.run_state = "inmigrate"
    monitor = Monitor(control)
    compared = 0
    for sent, golden in exchanges(name):
        replies = await monitor.feed(sent)
        assert len(replies) == len(golden), sent
        for reply, wanted in zip(replies, golden, strict=True):
            if reply == wanted:
                compared += 1
            else:
                assert is_expected(sent, wanted, reply), (sent, reply, wanted)
    assert compared
    add_row(
        request.config, TABLE, (name, str(compared)), head=("dialogue", "replies that are equal")
    )

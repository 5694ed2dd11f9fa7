"""Any requests, arguments and human lines give replies, and leave the monitor as it was."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from migrationd.qmp.handlers.table import COMMANDS
from tests.support.fake_control import FakeControl
from tests.support.fuzzing import cases
from tests.support.monitor import Monitor

NAMES = sorted(set(COMMANDS) - {"qmp_capabilities"})


def models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401
    """The models of an annotation: one, or those of a union."""
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


MEMBERS = sorted(
    {
        str(field.alias)
        for spec in COMMANDS.values()
        for model in models(spec.arguments)
        for field in model.model_fields.values()
    }
)
TEXT = st.text(st.characters(exclude_categories=("Cs",), max_codepoint=0x2FF), max_size=12)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | TEXT
    | st.sampled_from(["main", "tcp::0", "unix:/x", "file:/dev/fdset/0", "on", "events", "x" * 999])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(MEMBERS) | TEXT, inner, max_size=4)
    ),
    max_leaves=8,
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "execute": st.sampled_from(NAMES) | VALUES,
        "exec-oob": st.sampled_from(NAMES) | VALUES,
        "arguments": st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=4) | VALUES,
        "id": VALUES,
        "other": VALUES,
    },
)
ARGUMENTS = st.tuples(
    st.sampled_from(NAMES), st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=5)
)
WORDS = st.sampled_from(
    ["info", "help", "migrate", "migrate_set_parameter", "migrate_set_capability", "-d", "-r", "-a",
     "-", '"', "'", "\\", "max-bandwidth", "downtime-limit", "cpr-exec-command", "events", "on",
     "1e9", "0x", "07", "-1", "99999999999999999999", "calc_dirty_rate", "((((", "1/0", "~", "$a",
     "status", "savevm", "cpu", "?", "/", "\t", "set_vcpu_dirty_limit", "announce_self"]
) | TEXT  # fmt: skip
LINES = st.lists(WORDS, max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def replies(loop: asyncio.AbstractEventLoop, requests: list[object]) -> list[dict[str, object]]:
    async def talk() -> list[dict[str, object]]:
        monitor = Monitor(FakeControl())
        await monitor.feed(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
        found = []
        for request in requests:
            found += await monitor.feed(json.dumps(request).encode())
        (last,) = await monitor.feed(b'{"execute": "query-status", "id": "last"}')
        assert last["id"] == "last"
        assert "return" in last
        return found

    return loop.run_until_complete(talk())


def check(reply: dict[str, object]) -> None:
    if "error" in reply:
        error = reply["error"]
        assert isinstance(error, dict)
        assert set(error) == {"class", "desc"}
        assert not str(error["desc"]).startswith("internal error"), error
    else:
        assert "return" in reply


@settings(max_examples=cases(300))
@given(requests=st.lists(REQUESTS | VALUES.map(lambda v: {"v": v}), min_size=1, max_size=5))
def test_requests_of_any_form(loop: asyncio.AbstractEventLoop, requests: list[object]) -> None:
    found = replies(loop, requests)
    assert len(found) == len(requests)
    for request, reply in zip(requests, found, strict=True):
        assert isinstance(request, dict)
        check(reply)
        assert ("id" in request) == ("id" in reply)


@settings(max_examples=cases(700))
@given(call=ARGUMENTS)
def test_arguments_of_any_form(
    loop: asyncio.AbstractEventLoop,
    call: tuple[str, dict[str, object]],
) -> None:
    (reply,) = replies(loop, [{"execute": call[0], "arguments": call[1]}])
    check(reply)


@settings(max_examples=cases(700))
@given(line=LINES)
def test_human_lines_of_any_form(loop: asyncio.AbstractEventLoop, line: str) -> None:
    command = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
    (reply,) = replies(loop, [command])
    check(reply)
    text = reply.get("return", "")
    assert isinstance(text, str)
    assert text.replace("\r\n", "").count("\n") == 0

"""Compares a replayed scenario with its recording: replies to each request, events in order.

What depends on time is not compared: counters, how often a script polled, how many
MIGRATION_PASS events came, what they fell between. What is compared: class and text of
errors, members and types of replies, values of settings and states, and the events of each
connection with their status.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

BY_VALUE = (
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-status",
    "query-uuid",
    "query-name",
    "query-colo-status",
)
"""Commands whose replies are compared by value, not by members and types alone."""

Connection = tuple[str, int]


@dataclass
class Dialogue:
    """One connection.

    Attributes:
        requests: What was sent, without ids, ports and directories.
        replies: What came back to each of them.
        loose: What came back without an id, in order: when it came says nothing.
        events: Events in order; runs of MIGRATION_PASS count once.
    """

    requests: list[str] = field(default_factory=list)
    replies: list[list[str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


def shape(value: object) -> object:
    """Members and types."""
    match value:
        case dict():
            return {key: shape(item) for key, item in sorted(value.items())}
        case list():
            found: list[object] = []
            for item in map(shape, value):
                if item not in found:
                    found.append(item)
            return ["list", *found]
        case bool() | None:
            return type(value).__name__
        case int() | float():
            return "number"
    return "string"


def masked(text: str) -> str:
    """A text without ports, directories, machine types and made-up names."""
    text = re.sub(r"'[\w.-]+-machine\.", "'MACHINE-machine.", text)
    text = re.sub(r"#block\d+", "#block", text)
    text = re.sub(r"/[^ ',\"]*/", "/DIR/", text)
    return re.sub(r"(?<=[:\"])\d{4,5}(?=[\"',: ]|$)", "PORT", text)


def read(path: Path, *, by_shape: bool = False) -> dict[Connection, Dialogue]:
    """The connections of a recorded scenario.

    Args:
        path: The recording.
        by_shape: Keep of a reply no more than the class of its error or its members and types.
    """
    found: dict[Connection, Dialogue] = {}
    asked: dict[tuple[Connection, str], int] = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        if "side" not in record or record["dir"] not in ("send", "raw", "recv", "recv-text"):
            continue
        key = (record["side"], record.get("conn", 0))
        dialogue = found.setdefault(key, Dialogue())
        message = record["msg"]
        if record["dir"] in ("send", "raw"):
            identity = None
            if isinstance(message, dict):
                identity = message.get("id")
                message = {name: message[name] for name in message if name != "id"}
            dialogue.requests.append(masked(json.dumps(message)))
            dialogue.replies.append([])
            asked[key, json.dumps(identity)] = len(dialogue.requests) - 1
        elif isinstance(message, dict) and "event" in message:
            _add_event(dialogue, message)
        elif dialogue.requests:
            identity = json.dumps(message.get("id")) if isinstance(message, dict) else "null"
            at = asked.get((key, identity), -1)
            if identity == "null" or at < 0:
                dialogue.loose.append(_reply("", message, by_shape))
            else:
                dialogue.replies[at].append(_reply(dialogue.requests[at], message, by_shape))
    return found


def _add_event(dialogue: Dialogue, message: dict[str, Any]) -> None:
    data = message.get("data", {})
    is_pass = message["event"] == "MIGRATION_PASS"
    value = shape(data) if is_pass or message["event"].startswith("JOB") else data
    text = f"{message['event']} {json.dumps(value, sort_keys=True)}"
    if not (is_pass and dialogue.events[-1:] == [text]):
        dialogue.events.append(text)


def _reply(request: str, message: object, by_shape: bool) -> str:
    if not isinstance(message, dict):
        return masked(str(message))
    if by_shape and "error" in message:
        return str(message["error"]["class"])
    if by_shape:
        return json.dumps(shape(message.get("return")), sort_keys=True)
    if "error" in message:
        return masked(json.dumps({"error": message["error"]}))
    if "return" not in message:
        return json.dumps(shape(message))
    value = message["return"]
    is_value = any(f'"execute": "{name}"' in request for name in BY_VALUE)
    if is_value and isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, dict) and "status" in value and "query-migrate" in request:
        return json.dumps([value["status"], shape(value)], sort_keys=True)
    return json.dumps(shape(value), sort_keys=True)


def _polls_once(dialogue: Dialogue) -> Dialogue:
    """The dialogue with a request that was repeated counted once, with its last replies."""
    out = Dialogue(loose=dialogue.loose, events=dialogue.events)
    for request, replies in zip(dialogue.requests, dialogue.replies, strict=True):
        is_poll = '"query-' in request or '"info ' in request
        if is_poll and out.requests and out.requests[-1] == request:
            out.replies[-1] = replies
        else:
            out.requests.append(request)
            out.replies.append(replies)
    return out


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that differs.

    Attributes:
        where: The connection.
        what: The request, ``events`` or ``without id``.
        theirs: What QEMU said; empty where it was not asked.
        ours: What was said here; empty where it was not asked.
        occurrence: How often the same had been asked before.
    """

    where: str
    what: str
    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    occurrence: int = 0

    def __str__(self) -> str:
        return f"{self.where} {self.what}\n    QEMU: {self.theirs}\n    here: {self.ours}"


def differences(golden: Path, new: Path, *others: Path) -> list[Difference]:
    """What differs; empty for an identical dialogue.

    Args:
        golden: The recording.
        new: What was played.
        others: Further recordings of the same script: what one of them says is right too.
    """
    found = list(_differences(read(golden), read(new)))
    if not found:
        return []
    said = {sentence for other in others for sentence in _said(other)}
    return [
        item for item in found if (item.where, item.what, item.occurrence, item.ours) not in said
    ]


def shape_differences(
    golden: Path, new: Path, newer: Sequence[Path]
) -> tuple[list[Difference], list[Difference]]:
    """What differs in shape from an older release.

    Args:
        golden: Recording of the older release.
        new: What was played.
        newer: Recordings of the release that is mirrored.

    Returns:
        What differs, and what of it does not differ in the same way in the newer release.
    """
    played, older = read(new, by_shape=True), read(golden, by_shape=True)
    known = {item for path in newer for item in _differences(older, read(path, by_shape=True))}
    found = list(_differences(older, played))
    return found, [item for item in found if item not in known]


def _said(path: Path) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Each reply of a recording with what was asked, and for which time; each list of events."""
    for key, dialogue in read(path).items():
        where = f"{key[0]}/{key[1]}"
        once = _polls_once(dialogue)
        for at, (request, replies) in enumerate(zip(once.requests, once.replies, strict=True)):
            yield where, request, once.requests[:at].count(request), tuple(replies)
        yield where, "events", 0, tuple(dialogue.events)
        yield where, "without id", 0, tuple(dialogue.loose)


def _differences(
    theirs: dict[Connection, Dialogue], ours: dict[Connection, Dialogue]
) -> Iterator[Difference]:
    for key in sorted(ours.keys() | theirs.keys()):
        where = f"{key[0]}/{key[1]}"
        a = _polls_once(theirs.get(key, Dialogue()))
        b = _polls_once(ours.get(key, Dialogue()))
        for tag, i1, i2, j1, j2 in SequenceMatcher(
            None, a.requests, b.requests, autojunk=False
        ).get_opcodes():
            if tag != "equal":
                for at in range(i1, i2):
                    yield Difference(where, f"not asked: {a.requests[at]}", tuple(a.replies[at]))
                for at in range(j1, j2):
                    yield Difference(
                        where, f"asked as well: {b.requests[at]}", (), tuple(b.replies[at])
                    )
                continue
            for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
                if a.replies[i] != b.replies[j]:
                    yield Difference(
                        where,
                        a.requests[i],
                        tuple(a.replies[i]),
                        tuple(b.replies[j]),
                        b.requests[:j].count(b.requests[j]),
                    )
        if a.loose != b.loose:
            yield Difference(where, "without id", tuple(a.loose), tuple(b.loose))
        if a.events != b.events:
            yield Difference(where, "events", tuple(a.events), tuple(b.events))

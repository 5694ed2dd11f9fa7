"""Declarations to bytes and back, as QEMU encodes them."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from migrationd.errors import GuestError
from migrationd.workload import (
    Subsection,
    VMState,
    array,
    boolean,
    buffer,
    equal,
    i32,
    struct,
    subsection,
    u8,
    u16,
    u32,
    u64,
    varray,
)


@dataclass
class Timer:
    at: int = 0
    armed: bool = False


@dataclass
class Clock:
    ticks: int = 0
    step: int = 1
    name: bytes = b"\0" * 4
    offsets: list[int] = field(default_factory=lambda: [0, 0, 0])
    count: int = 0
    queue: list[int] = field(default_factory=list)
    timer: Timer = field(default_factory=Timer)
    leap: int = 0


TIMER = VMState("timer", fields=(u64("at"), boolean("armed")))
CLOCK = VMState(
    "clock",
    version_id=2,
    minimum_version_id=1,
    fields=(
        u64("ticks"),
        i32("step", since=2),
        buffer("name", 4),
        array(u16("offsets"), 3),
        u8("count"),
        varray(u32("queue"), "count"),
        struct("timer", TIMER),
    ),
    subsections=(
        subsection("clock/leap", needed=lambda clock: clock.leap != 0, fields=(u32("leap"),)),
    ),
)


def example() -> Clock:
    return Clock(0x0102, -2, b"abcd", [1, 2, 3], 2, [7, 8], Timer(5, True), 9)


BYTES = bytes.fromhex(
    "0000000000000102"  # ticks
    "fffffffe"  # step
    "61626364"  # name
    "000100020003"  # offsets
    "02 00000007 00000008"  # count, queue
    "0000000000000005 01"  # timer
    "05 0a 636c6f636b2f6c656170 00000001 00000009"  # subsection clock/leap
)


def test_bytes_are_those_of_the_format() -> None:
    body, description = CLOCK.encode(example())
    assert body == BYTES
    assert description["vmsd_name"] == "clock"
    assert description["version"] == 2
    assert description["fields"] == [
        {"name": "ticks", "type": "uint64", "size": 8},
        {"name": "step", "type": "int32", "size": 4},
        {"name": "name", "type": "buffer", "size": 4},
        {"name": "offsets", "type": "uint16", "size": 2, "array_len": 3},
        {"name": "count", "type": "uint8", "size": 1},
        {"name": "queue", "type": "uint32", "size": 4, "array_len": 2},
        {
            "name": "timer",
            "type": "struct",
            "size": 9,
            "struct": {
                "vmsd_name": "timer",
                "version": 1,
                "fields": [
                    {"name": "at", "type": "uint64", "size": 8},
                    {"name": "armed", "type": "bool", "size": 1},
                ],
            },
        },
    ]
    assert description["subsections"] == [
        {
            "vmsd_name": "clock/leap",
            "version": 1,
            "fields": [{"name": "leap", "type": "uint32", "size": 4}],
        }
    ]


def test_the_description_gives_the_size_of_the_body() -> None:
    body, description = CLOCK.encode(example())
    size = sum(item["size"] * item.get("array_len", 1) for item in description["fields"])
    for sub in description["subsections"]:
        size += 2 + len(sub["vmsd_name"]) + 4 + sum(item["size"] for item in sub["fields"])
    assert size == len(body)


def test_what_was_encoded_is_decoded() -> None:
    clock = Clock()
    CLOCK.decode(BYTES, clock, 2)
    assert clock == example()


def test_an_older_body_lacks_newer_fields() -> None:
    clock = Clock(step=77)
    CLOCK.decode(BYTES[:8] + BYTES[12:], clock, 1)
    assert clock.step == 77
    assert clock.queue == [7, 8]


def test_a_subsection_that_is_not_needed_stays_away() -> None:
    clock = example()
    clock.leap = 0
    body, description = CLOCK.encode(clock)
    assert body == BYTES[: -2 - 10 - 8]
    assert "subsections" not in description


@pytest.mark.parametrize(
    ("body", "version", "text"),
    [
        (BYTES, 3, "incoming version_id 3 is too new for local version_id 2"),
        (BYTES, 0, "incoming version_id 0 is too old for local minimum version_id 1"),
        (BYTES[:10], 2, "field 'step' needs 4 bytes at 8"),
        (BYTES + b"\0", 2, "1 bytes of the body are left at 60"),
        (BYTES[:-20] + b"\x05\x0aclock/moon" + bytes(8), 2, "subsection 'clock/moon' is not known"),
        (BYTES[:39] + b"\x02" + BYTES[40:], 2, "field 'armed': 2 is no bool"),
    ],
)
def test_what_cannot_be_loaded_is_named(body: bytes, version: int, text: str) -> None:
    with pytest.raises(GuestError, match=text):
        CLOCK.decode(body, Clock(), version)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ticks": -1}, "field 'ticks': -1 is no uint64"),
        ({"name": b"long!"}, "field 'name': 5 bytes instead of 4"),
        ({"queue": [1]}, "field 'queue': 1 elements instead of 2"),
        ({"count": -1}, "field 'count'"),
        ({"count": 7}, "field 'queue': 2 elements instead of 7"),
        ({"name": 4}, "field 'name': memoryview: a bytes-like object is required"),
        ({"name": "text"}, "field 'name': memoryview: a bytes-like object is required"),
        ({"ticks": 1.5}, "field 'ticks': 1.5 is no uint64"),
        ({"ticks": 1 << 64}, "field 'ticks': 18446744073709551616 is no uint64"),
        ({"offsets": None}, "field 'offsets': 'NoneType' object is not iterable"),
        ({"offsets": [1, 2, "3"]}, "field 'offsets': '3' is no uint16"),
        ({"timer": None}, "field 'at': 'NoneType' object has no attribute 'at'"),
        ({"timer": Timer(0, armed=1)}, "field 'armed': 1 is no bool"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_saved_is_named(change: dict[str, object], text: str) -> None:
    clock = example()
    for name, value in change.items():
        setattr(clock, name, value)
    with pytest.raises(GuestError, match=text):
        CLOCK.encode(clock)


def test_a_structure_needs_an_object_to_be_loaded_into() -> None:
    body, _ = CLOCK.encode(example())
    with pytest.raises(GuestError, match="field 'timer': there is nothing to load it into"):
        CLOCK.decode(body, SimpleNamespace(name=b"", timer=None), 2)


def test_hooks_and_equal_fields() -> None:
    calls: list[str] = []
    state = VMState(
        "x",
        fields=(equal(u32("size")),),
        pre_save=lambda _: calls.append("pre_save"),
        pre_load=lambda _: calls.append("pre_load"),
        post_load=lambda _: calls.append("post_load"),
    )
    body, _ = state.encode(SimpleNamespace(size=4))
    state.decode(body, SimpleNamespace(size=4), 1)
    assert calls == ["pre_save", "pre_load", "post_load"]
    with pytest.raises(GuestError, match="field 'size' is 4, but 5 here"):
        state.decode(body, SimpleNamespace(size=5), 1)


def part(name: str) -> Subsection:
    return subsection(name, needed=bool, fields=())


@pytest.mark.parametrize(
    "declare",
    [
        lambda: VMState(""),
        lambda: VMState("a device"),
        lambda: VMState("x", fields=(array(u8("a"), -1),)),
        lambda: VMState("x", fields=(array(array(u8("a"), 2), 3),)),
        lambda: VMState("x", subsections=(part("x/y"), part("x/y"))),
        lambda: VMState("x", version_id=1, minimum_version_id=2),
        lambda: VMState("x", fields=(u8("a"), u8("a"))),
        lambda: VMState("x", fields=(u8("a", since=2),)),
        lambda: VMState("x", fields=(varray(u8("a"), "n"), u8("n"))),
        lambda: VMState("x", subsections=(subsection("y/z", needed=bool, fields=()),)),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused(declare: object) -> None:
    with pytest.raises(GuestError):
        declare()  # type: ignore[operator]

"""What a primary may say, and that a replica is always that of the last whole checkpoint."""

from collections.abc import Iterator

import pytest

from migrationd.errors import StreamError
from tests.conformance.colo_primary import (
    LOADED,
    PAGE,
    READY,
    RECEIVED,
    REPLY,
    REQUEST,
    SEND,
    SIZE,
    Secondary,
    checkpoint,
    device,
    pages,
    recorded_devices,
)

ANSWERS = REPLY + RECEIVED + LOADED
GOOD = pages((3, b"g" * PAGE), (4, b"h" * PAGE))
OTHER = pages((3, b"x" * PAGE), (5, b"\0"))


@pytest.fixture
def secondary() -> Iterator[Secondary]:
    made = Secondary()
    yield made
    made.close()


@pytest.mark.parametrize("piece", [1 << 20, 4096, 7])
def test_checkpoint_after_checkpoint(secondary: Secondary, piece: int) -> None:
    timer = device("timer", b"T" * 24)
    rest = recorded_devices()[len(timer) :]
    secondary.follow_to_the_end(checkpoint(GOOD) + checkpoint(OTHER, timer + rest), piece)
    assert secondary.answers == READY + 2 * ANSWERS
    ram = next(block for block in secondary.guest.ram if block.idstr == "pc.ram")
    assert bytes(ram.page(3)) == b"x" * PAGE
    assert bytes(ram.page(4)) == b"h" * PAGE
    assert bytes(ram.page(5)) == bytes(PAGE)
    assert secondary.guest.devices[0].body == b"T" * 24
    assert len(secondary.guest.devices) == 30


TIMER = device("timer", b"T" * 24)
HUGE = (1 << 40).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (SEND, "the primary says VMSTATE_SEND, not CHECKPOINT_REQUEST"),
        (bytes.fromhex("0000abcd"), "says 43981, not"),
        (REQUEST + SIZE, "says VMSTATE_SIZE, not VMSTATE_SEND"),
        (checkpoint(OTHER + pages((3, b"\xaa"))), "filled with byte 0xaa"),
        (checkpoint(OTHER + pages((256, b"y" * PAGE))), "0x100000"),
        (checkpoint(OTHER + pages((0, b"y" * PAGE), block="vga")), "vga"),
        (checkpoint(OTHER + bytes(7) + b"\x40" + b"\x06pc.ram" + b"\1\0\2\0\0"), ""),
        (REQUEST + SEND + b"\x08\0\x09\0\0", "Command"),
        (checkpoint(OTHER, recorded_devices() + b"\0"), "inside a section"),
        (checkpoint(OTHER, recorded_devices()[:-9]), ""),
        (checkpoint(OTHER, b""), "the devices are not 0 bytes"),
        (checkpoint(OTHER)[: -len(recorded_devices()) - 8] + HUGE, "1099511627776 bytes of"),
        (
            checkpoint(OTHER, 2 * device("timer", b"T" * 24) + b"\0"),
            "'timer' instance 0 came twice",
        ),
        (checkpoint(OTHER, TIMER + b"\0"), "lacks device 'cpu_common'"),
        (checkpoint(OTHER, b"\x03\0\0\0\x02" + bytes(7) + b"\x10\0"), ""),
    ],
)
def test_what_is_no_checkpoint_changes_nothing(
    secondary: Secondary, said: bytes, text: str
) -> None:
    error = secondary.follow(checkpoint(GOOD) + said)
    assert isinstance(error, StreamError), error
    assert text in str(error)
    assert secondary.answers.count(LOADED) == 1
    assert secondary.answers.startswith(READY + ANSWERS)
    # The next primary of this process starts with nothing of it.
    ram = next(block for block in secondary.guest.ram if block.idstr == "pc.ram")
    assert bytes(ram.page(3)) == b"g" * PAGE


def test_a_checkpoint_without_end_is_refused(
    secondary: Secondary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrationd.incoming.colo.STAGE_SLACK_BYTES", 1 << 20)
    page = pages((3, b"x" * PAGE))
    error = secondary.follow(REQUEST + SEND + b"\x03\0\0\0\x02" + page * 1000)
    assert "a checkpoint of more than" in str(error)


def test_the_connection_may_break_anywhere(secondary: Secondary) -> None:
    said = checkpoint(GOOD) + checkpoint(OTHER)
    for cut in [*range(0, 60, 7), *range(len(said) - 40, len(said)), len(said) // 2]:
        other = Secondary()
        other.follow_to_the_end(said[:cut])
        other.close()
    secondary.follow_to_the_end(said)

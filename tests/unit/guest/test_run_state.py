import pytest

from migrationd.guest.run_state import (
    GLOBAL_STATE_BYTES,
    Owner,
    decode_run_state,
    encode_run_state,
)


def body(name: str, flags: bytes = b"\0\0") -> bytes:
    raw = name.encode()
    head = (len(raw) + 1).to_bytes(4, "big") + raw.ljust(32, b"\0") + flags
    return head.ljust(GLOBAL_STATE_BYTES, b"\0")


def test_the_name_is_read_from_the_fixed_field() -> None:
    assert decode_run_state(body("running")) == "running"
    assert decode_run_state(body("prelaunch")) == "prelaunch"


@pytest.mark.parametrize("flags", [b"\0\0", b"\x01\0", b"\x01\x01"])
def test_another_run_state_leaves_everything_else_as_it_came(flags: bytes) -> None:
    changed = encode_run_state(body("internal-error", flags), "paused")
    assert changed == body("paused", flags)
    assert len(changed) == GLOBAL_STATE_BYTES


@pytest.mark.parametrize(
    "malformed",
    [b"", bytes(103), bytes(105), bytes(104), b"\0\0\0\x08\xff\xfe".ljust(104, b"\0")],
)
def test_a_malformed_body_has_no_run_state(malformed: bytes) -> None:
    assert decode_run_state(malformed) is None


def test_only_a_guest_that_is_being_handed_over_is_handed_over() -> None:
    possible = {(a, b) for a in Owner for b in Owner if a is not b and a.may_become(b)}
    assert possible == {
        (Owner.HELD, Owner.HANDING_OVER),
        (Owner.HANDING_OVER, Owner.HANDED_OVER),
        (Owner.HANDING_OVER, Owner.HELD),
        (Owner.HANDED_OVER, Owner.HELD),
    }

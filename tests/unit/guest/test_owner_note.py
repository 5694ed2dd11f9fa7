"""What a workload keeps for its next daemon."""

import pytest

from migrationd.errors import GuestError
from migrationd.guest.owner_note import OwnerNote, decode_note, encode_note
from migrationd.guest.protocol import Keep
from migrationd.guest.run_state import LazyHandOver, Owner


@pytest.mark.parametrize(
    "note",
    [
        OwnerNote(Owner.HELD, None),
        OwnerNote(Owner.HANDED_OVER, "tcp:there:4444"),
        OwnerNote(Owner.HANDING_OVER, None, LazyHandOver(preempt=True, is_loaded=False)),
        OwnerNote(Owner.HANDING_OVER, "x", LazyHandOver(preempt=False, is_loaded=True)),
    ],
)
def test_it_comes_back(note: OwnerNote) -> None:
    assert decode_note(encode_note(note)) == note


def test_any_destination_fits_the_message() -> None:
    text = encode_note(OwnerNote(Owner.HANDED_OVER, '"' * 5000))
    assert Keep(note=text)
    text = encode_note(OwnerNote(Owner.HANDED_OVER, "ü" * 5000))
    assert Keep(note=text)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "1",
        "{}",
        '{"owner": "me", "destination": null, "lazy": null}',
        '{"owner": "held", "destination": 3, "lazy": null}',
        '{"owner": "held", "destination": null, "lazy": {}}',
        "[" * 1000,
    ],
)
def test_what_no_daemon_wrote(text: str) -> None:
    with pytest.raises(GuestError, match="none of a daemon's"):
        decode_note(text)

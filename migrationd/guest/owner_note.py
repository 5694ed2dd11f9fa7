"""Who owns a workload, as the workload keeps it for the daemon after this one.

A workload outlives its daemon. What must not be forgotten with the daemon, that the guest
runs elsewhere or may, is therefore a note that the workload says again to the next one.

    {"owner": "handing-over", "destination": "tcp:...", "lazy": {"preempt": true, ...}}
"""

import json
from dataclasses import asdict, dataclass

from migrationd.errors import GuestError
from migrationd.guest.run_state import LazyHandOver, Owner

_DESTINATION_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class OwnerNote:
    """What is on record.

    Attributes:
        owner: Who owns the guest.
        destination: Where it went, in words, cut short if need be.
        lazy: How, if by postcopy that has not ended.
    """

    owner: Owner
    destination: str | None
    lazy: LazyHandOver | None = None


def encode_note(note: OwnerNote) -> str:
    """Printable ASCII; empty for a guest that is held here, which is nothing to remember."""
    if note.owner is Owner.HELD:
        return ""
    return json.dumps(
        {
            "owner": note.owner.value,
            "destination": note.destination and note.destination[:_DESTINATION_CHARACTERS],
            "lazy": asdict(note.lazy) if note.lazy is not None else None,
        }
    )


def decode_note(text: str) -> OwnerNote:
    """What a workload kept.

    Raises:
        GuestError: No daemon wrote that.
    """
    if not text:
        return OwnerNote(Owner.HELD, None)
    try:
        tree = json.loads(text)
        lazy = tree["lazy"]
        destination = tree["destination"]
        if destination is not None and not isinstance(destination, str):
            raise TypeError
        return OwnerNote(
            Owner(tree["owner"]),
            destination,
            None
            if lazy is None
            else LazyHandOver(preempt=lazy["preempt"] is True, is_loaded=lazy["is_loaded"] is True),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise GuestError("the workload's note of its owner is none of a daemon's") from None

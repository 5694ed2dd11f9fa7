"""The run state that travels with a guest, and who owns the guest.

    be32 length of the name + 1
    name, NUL padded: 32 bytes (9.0 and later; then two flags) or 100 bytes

Reference: the ``globalstate`` section, stream format 7.3; 104 bytes in all versions.
"""

from dataclasses import dataclass
from enum import Enum

from migrationd.errors import InvalidState

GLOBAL_STATE = "globalstate"
"""Name of the section."""

GLOBAL_STATE_BYTES = 104
_NAME_BYTES = 32

RUNNING = "running"
PAUSED = "paused"
PRELAUNCH = "prelaunch"


class Owner(Enum):
    """Who owns a held guest; kept durably with it.

        HELD ──switchover──> HANDING_OVER ──destination's SHUT 0──> HANDED_OVER
          ^                       │  migration failed, or cont            │ cont
          └───────────────────────┴───────────────────────────────────────┘

    ``HANDING_OVER`` is on record from before the first byte of the switchover to the
    destination's word. QEMU's rule decides what it means: the source keeps the guest unless
    the destination said that it has it. A migration that fails in this state under a living
    daemon therefore gives the guest back at once. A daemon that died in this state and
    starts again keeps the guest too, but it cannot know whether the word was under way: the
    destination may be running the guest. Nothing is sent before the user, who can look,
    takes the guest back with ``cont``; so no restarted tool makes it run twice.

    A template (``-keep``) is always ``HELD``: being sent is not being handed over.
    """

    HELD = "held"
    HANDING_OVER = "handing-over"
    HANDED_OVER = "handed-over"

    def may_become(self, other: "Owner") -> bool:
        """Whether a guest of this owner can have that one next."""
        return other in _NEXT[self]


_NEXT = {
    Owner.HELD: (Owner.HELD, Owner.HANDING_OVER),
    Owner.HANDING_OVER: (Owner.HELD, Owner.HANDED_OVER),
    Owner.HANDED_OVER: (Owner.HELD,),
}


class Owned:
    """A guest that somebody owns: whoever holds it, or its destination.

    Attributes:
        has_memory: False once its memory itself went to the destination: nothing is left
            that could be taken back.
    """

    _owner = Owner.HELD
    has_memory = True

    @property
    def owner(self) -> Owner:
        """Who owns the guest; only the changes that :class:`Owner` draws are possible.

        Raises:
            InvalidState: On assignment of an owner that the present one cannot become.
        """
        return self._owner

    @owner.setter
    def owner(self, owner: Owner) -> None:
        if owner is not self._owner and not self._owner.may_become(owner):
            raise InvalidState(f"a guest that is {self._owner.value} cannot be {owner.value} next")
        self._owner = owner


@dataclass(frozen=True, slots=True)
class LazyHandOver:
    """A hand-over by postcopy that has begun; kept durably, for it outlives the daemon.

    The destination knows which pages it has, so nothing about pages is kept.

    Attributes:
        preempt: Requested pages have a channel of their own.
        is_loaded: The destination said that it runs the guest. Before that it may.
    """

    preempt: bool
    is_loaded: bool


def decode_run_state(body: bytes) -> str | None:
    """Name of the run state in a ``globalstate`` body; None if it is malformed."""
    if len(body) != GLOBAL_STATE_BYTES:
        return None
    name = body[4:].split(b"\0", 1)[0]
    return name.decode("ascii") if name.isascii() and name else None


def encode_run_state(body: bytes, name: str) -> bytes:
    """A ``globalstate`` body with another run state; the rest stays as it came.

    Args:
        body: The body that arrived, 104 bytes.
        name: QMP name of a run state, below 32 bytes.
    """
    raw = name.encode("ascii")
    padded = raw.ljust(_NAME_BYTES, b"\0")
    return (len(raw) + 1).to_bytes(4, "big") + padded + body[4 + _NAME_BYTES :]

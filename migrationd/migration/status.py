"""The one table of migration statuses: (role, status, cause) -> status.

Nothing else assigns a status. Every change is handed to the callback given at
construction, which becomes the MIGRATION event.

Reference: QEMU 11.1's ``MigrationStatus`` and the order of its MIGRATION events
(``failing`` precedes ``failed`` at a source; a destination fails at once).
"""

from collections.abc import Callable
from enum import Enum

from migrationd.errors import InvalidState


class Role(Enum):
    """Which side of a migration."""

    OUTGOING = "outgoing"
    INCOMING = "incoming"


class Cause(Enum):
    """What makes a status change."""

    START = "start"
    """``migrate`` accepted, or a listener opened."""
    STREAM = "stream"
    """The stream flows: set-up data written, or its first bytes read."""
    PAUSE_BEFORE_SWITCHOVER = "pause before switchover"
    SWITCHOVER = "switchover"
    """Device state goes out."""
    POSTCOPY = "postcopy"
    """The guest is to run at the destination before its memory is there."""
    PACKAGE_LOADED = "package loaded"
    """The destination runs the guest."""
    PAUSE = "pause"
    """The connection was lost in postcopy: neither side can go on, neither loses anything."""
    RECOVER_SETUP = "recover setup"
    """``migrate`` with ``resume`` accepted: connecting."""
    RECOVER = "recover"
    """A new connection: the two sides agree on who has which page."""
    RECOVERED = "recovered"
    COMPLETE = "complete"
    REPLICATE = "replicate"
    """The destination has a replica, which follows the guest from checkpoint to checkpoint."""
    SAVED = "saved"
    """A background snapshot is whole; the guest stays."""
    FAIL = "fail"
    CANCEL = "cancel"
    CLEANED_UP = "cleaned up"
    """Channels are closed after a failure or a cancel."""


_REST = ("none", "completed", "failed", "cancelled")
_CANCELLABLE = ("setup", "active", "pre-switchover", "device", "colo")

_OUTGOING: dict[tuple[str, Cause], str] = {
    **{(status, Cause.START): "setup" for status in _REST},
    **{(status, Cause.CANCEL): "cancelling" for status in _CANCELLABLE},
    **{(status, Cause.FAIL): "failing" for status in _CANCELLABLE},
    ("setup", Cause.STREAM): "active",
    ("active", Cause.PAUSE_BEFORE_SWITCHOVER): "pre-switchover",
    ("active", Cause.SWITCHOVER): "device",
    ("pre-switchover", Cause.SWITCHOVER): "device",
    ("active", Cause.SAVED): "completed",
    ("device", Cause.COMPLETE): "completed",
    ("device", Cause.REPLICATE): "colo",
    ("colo", Cause.COMPLETE): "completed",
    # Differs from QEMU: a cancel that crosses the destination's SHUT 0 comes too late. The
    # destination owns the guest, and to call it cancelled would make two owners.
    ("cancelling", Cause.COMPLETE): "completed",
    ("device", Cause.POSTCOPY): "postcopy-device",
    ("postcopy-device", Cause.PACKAGE_LOADED): "postcopy-active",
    # Up to here the destination may refuse, and the guest stays. Differs from QEMU: where
    # nothing but silence came behind the package the guest may run there, so it is paused.
    ("postcopy-device", Cause.FAIL): "failing",
    ("postcopy-device", Cause.PAUSE): "postcopy-paused",
    ("postcopy-active", Cause.PAUSE): "postcopy-paused",
    ("postcopy-active", Cause.COMPLETE): "completed",
    # A daemon that begins with a guest whose destination runs it.
    ("none", Cause.PAUSE): "postcopy-paused",
    ("postcopy-paused", Cause.RECOVER_SETUP): "postcopy-recover-setup",
    ("postcopy-recover-setup", Cause.PAUSE): "postcopy-paused",
    ("postcopy-recover-setup", Cause.RECOVER): "postcopy-recover",
    ("postcopy-recover", Cause.PAUSE): "postcopy-paused",
    ("postcopy-recover", Cause.RECOVERED): "postcopy-active",
    # Somebody who knows that the destination never loaded the package takes the guest back.
    ("postcopy-paused", Cause.FAIL): "failing",
    ("failing", Cause.CLEANED_UP): "failed",
    ("cancelling", Cause.CLEANED_UP): "cancelled",
}

_INCOMING: dict[tuple[str, Cause], str] = {
    ("none", Cause.START): "setup",
    ("setup", Cause.STREAM): "active",
    ("active", Cause.COMPLETE): "completed",
    ("active", Cause.REPLICATE): "colo",
    ("colo", Cause.COMPLETE): "completed",
    ("colo", Cause.FAIL): "failed",
    ("setup", Cause.FAIL): "failed",
    ("active", Cause.FAIL): "failed",
    ("active", Cause.POSTCOPY): "postcopy-device",
    ("postcopy-device", Cause.PACKAGE_LOADED): "postcopy-active",
    ("postcopy-device", Cause.FAIL): "failed",
    ("postcopy-active", Cause.PAUSE): "postcopy-paused",
    ("postcopy-paused", Cause.RECOVER): "postcopy-recover",
    ("postcopy-recover", Cause.RECOVERED): "postcopy-active",
    ("postcopy-recover", Cause.PAUSE): "postcopy-paused",
    ("postcopy-active", Cause.COMPLETE): "completed",
    # A workload that ran here is gone, and all that could be waited for with it.
    ("postcopy-active", Cause.FAIL): "failed",
    ("postcopy-paused", Cause.FAIL): "failed",
    ("postcopy-recover", Cause.FAIL): "failed",
}

TRANSITIONS: dict[Role, dict[tuple[str, Cause], str]] = {
    Role.OUTGOING: _OUTGOING,
    Role.INCOMING: _INCOMING,
}

_AT_REST = frozenset(_REST)


class StatusMachine:
    """The status of one side.

    Args:
        role: Which table applies.
        on_change: Called with the new status after each change, on the thread
            that called :meth:`advance` (always the event loop's).
    """

    def __init__(self, role: Role, on_change: Callable[[str], None]) -> None:
        self._table = TRANSITIONS[role]
        self._role = role
        self._on_change = on_change
        self._status = "none"

    @property
    def status(self) -> str:
        """QMP spelling of the current status."""
        return self._status

    @property
    def is_running(self) -> bool:
        """Whether a migration is in progress (also while it is being cancelled)."""
        return self._status not in _AT_REST

    def can(self, cause: Cause) -> bool:
        """Whether ``cause`` changes the status now."""
        return (self._status, cause) in self._table

    def advance(self, cause: Cause) -> str:
        """Change the status.

        Returns:
            The new status.

        Raises:
            InvalidState: If the table has no entry for the cause.
        """
        try:
            self._status = self._table[self._status, cause]
        except KeyError:
            raise InvalidState(
                f"{self._role.value} migration in status '{self._status}': "
                f"no transition for '{cause.value}'"
            ) from None
        self._on_change(self._status)
        return self._status

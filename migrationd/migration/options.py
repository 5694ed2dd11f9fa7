"""The settings of one process: every capability and parameter, changed all or nothing.

A change is checked as a whole on a copy, with the values that it does not name, and
committed if nothing is wrong with it.

Reference: QEMU 11.1's order of checks and texts.
"""

from collections.abc import Mapping, Sequence

from migrationd.errors import QMPError
from migrationd.guest.ram_block import IGNORE_SHARED
from migrationd.migration.capabilities import (
    CAPABILITIES,
    NOT_BUILT,
    ZERO_COPY_NEEDS_PLAIN_MULTIFD,
    check_capabilities,
    is_plain,
)
from migrationd.migration.parameters import (
    CHECKED_FIRST,
    CHECKED_LAST,
    PARAMETERS,
    Value,
    check_parameter,
)

__all__ = ("CAPABILITIES", "NOT_BUILT", "PARAMETERS", "MigrationOptions", "Value")

_BEFORE_INCOMING = (
    ("postcopy-preempt", "Postcopy preempt must be set before incoming starts"),
    ("multifd", "Multifd must be set before incoming starts"),
)


_NOT_TOGETHER = (
    ("mapped-ram", IGNORE_SHARED),
    ("multifd", "x-colo"),
    ("mapped-ram", "x-colo"),
)
"""What QEMU takes, and the engine does not: no checkpoint comes by channels, or out of a file."""


class MigrationOptions:
    """The settings of one process; both directions read them.

    Args:
        limits_writes: Whether the guest can be kept from writing too fast (``dirty-limit``).

    Attributes:
        is_listening: Whether a listener is open: what decides about its connections can then
            not be switched on any more.
    """

    def __init__(self, *, limits_writes: bool = False) -> None:
        self.is_listening = False
        self.limits_writes = limits_writes
        self._capabilities = dict.fromkeys(CAPABILITIES, False)
        self._parameters: dict[str, Value] = {item.name: item.default for item in PARAMETERS}

    @property
    def capabilities(self) -> Mapping[str, bool]:
        """Capabilities in enumeration order."""
        return self._capabilities

    @property
    def parameters(self) -> Mapping[str, Value]:
        """Parameters by QMP name; None is a parameter that is absent until it is set."""
        return self._parameters

    def set_capabilities(self, changes: Sequence[tuple[str, bool]]) -> None:
        """Apply changes in order; the whole result is checked, then committed.

        Args:
            changes: Capability and whether it is to be on; the last one for a name wins.

        Raises:
            QMPError: With QEMU's text; nothing changes.
        """
        new = self._capabilities | dict(changes)
        check_capabilities(new, self._parameters, limits_writes=self.limits_writes)
        if self.is_listening:
            for name, text in _BEFORE_INCOMING:
                if new[name] and not self._capabilities[name]:
                    raise QMPError(text)
        self._capabilities = new

    def set_parameters(self, changes: Mapping[str, Value]) -> None:
        """Apply changes; all values are checked, then committed.

        Args:
            changes: QMP name to value, of the parameter's type.

        Raises:
            QMPError: With QEMU's text; nothing changes.
        """
        new = self._parameters | dict(changes)
        for name in CHECKED_FIRST:
            check_parameter(new, name)
        if self._capabilities["zero-copy-send"] and not is_plain(new):
            raise QMPError(ZERO_COPY_NEEDS_PLAIN_MULTIFD)
        # As in QEMU it is the values of now that count: mapped-ram has to go first.
        if self._capabilities["mapped-ram"] and not (is_plain(self._parameters) and is_plain(new)):
            raise QMPError("Mapped-ram only available for non-compressed non-TLS multifd migration")
        for name in CHECKED_LAST:
            check_parameter(new, name)
        self._parameters = new

    def check_built(self) -> None:
        """Whether the engine can do what is set, asked before a migration begins.

        Settings themselves follow QEMU's rules alone; so a tool's order of commands is the same,
        and nothing starts that would leave out what was asked for.

        Raises:
            QMPError: A capability that is set has no engine part yet.
        """
        for one, other in _NOT_TOGETHER:
            if self._capabilities[one] and self._capabilities[other]:
                raise QMPError(f"{one.capitalize()} with {other} is not supported in this version")
        for name in CAPABILITIES:
            if self._capabilities[name] and name in NOT_BUILT:
                raise QMPError(
                    f"Capability '{name}' is not supported in this version of migrationd"
                )

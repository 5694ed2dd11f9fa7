"""Migration capabilities: names, which ones are built, and what they exclude.

Reference: QEMU 11.1's enumeration order, its order of checks and its texts.
"""

from collections.abc import Mapping

from migrationd.errors import QMPError
from migrationd.migration.parameters import Value

CAPABILITY_SINCE: dict[str, str] = {
    "xbzrle": "1.2",
    "rdma-pin-all": "2.0",
    "auto-converge": "1.6",
    "events": "2.4",
    "postcopy-ram": "2.6",
    "x-colo": "2.8",
    "release-ram": "2.9",
    "return-path": "2.10",
    "pause-before-switchover": "2.11",
    "multifd": "4.0",
    "dirty-bitmaps": "2.12",
    "postcopy-blocktime": "3.0",
    "late-block-activate": "3.0",
    "x-ignore-shared": "4.0",
    "validate-uuid": "4.2",
    "background-snapshot": "6.0",
    "zero-copy-send": "7.1",
    "postcopy-preempt": "7.1",
    "switchover-ack": "8.1",
    "dirty-limit": "8.1",
    "mapped-ram": "9.0",
}
"""Capabilities in enumeration order, and the QEMU release that brought each."""

CAPABILITIES: tuple[str, ...] = tuple(CAPABILITY_SINCE)

NOT_BUILT: frozenset[str] = frozenset(("rdma-pin-all",))
"""Capabilities whose engine part is not there: nothing starts while one is on."""

_SNAPSHOT_EXCLUDES: tuple[str, ...] = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)

_DIRTY_LIMIT_NEEDS_KVM = "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
ZERO_COPY_NEEDS_PLAIN_MULTIFD = (
    "Zero copy only available for non-compressed non-TLS multifd migration"
)


def check_capabilities(
    new: Mapping[str, bool], parameters: Mapping[str, Value], *, limits_writes: bool = False
) -> None:
    """Check a complete set against itself and against the parameters.

    Args:
        new: Every capability.
        parameters: Every parameter as it is now.
        limits_writes: Whether the guest can be kept from writing too fast, as workloads can.

    Raises:
        QMPError: The first conflict, in QEMU's words.
    """
    text = _conflict(new, parameters, limits_writes)
    if text is not None:
        raise QMPError(text)


def _conflict(
    new: Mapping[str, bool], parameters: Mapping[str, Value], limits_writes: bool
) -> str | None:
    if new["x-colo"] and not new["return-path"]:
        return "Capability 'x-colo' requires capability 'return-path'"
    if new["postcopy-ram"] and new["x-ignore-shared"]:
        return "Postcopy is not compatible with ignore-shared"
    if new["background-snapshot"]:
        for name in _SNAPSHOT_EXCLUDES:
            if new[name]:
                return f"Background-snapshot is not compatible with {name}"
    is_plain_multifd = new["multifd"] and not new["xbzrle"] and is_plain(parameters)
    if new["zero-copy-send"] and not is_plain_multifd:
        return ZERO_COPY_NEEDS_PLAIN_MULTIFD
    if new["postcopy-preempt"] and not new["postcopy-ram"]:
        return "Postcopy preempt requires postcopy-ram"
    if new["switchover-ack"] and not new["return-path"]:
        return "Capability 'switchover-ack' requires capability 'return-path'"
    if new["dirty-limit"]:
        if new["auto-converge"]:
            return "dirty-limit conflicts with auto-converge either of then available currently"
        if not limits_writes:
            return _DIRTY_LIMIT_NEEDS_KVM
    if new["multifd"] and new["xbzrle"]:
        return "Multifd is not compatible with xbzrle"
    if new["mapped-ram"] and new["xbzrle"]:
        return "Mapped-ram migration is incompatible with xbzrle"
    if new["mapped-ram"] and new["postcopy-ram"]:
        return "Mapped-ram migration is incompatible with postcopy"
    return None


def is_plain(parameters: Mapping[str, Value]) -> bool:
    """Whether neither compression nor TLS is set."""
    return parameters["multifd-compression"] == "none" and not parameters["tls-creds"]

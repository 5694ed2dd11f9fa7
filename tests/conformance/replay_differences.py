"""Where a replayed scenario may differ from QEMU 11.1's recording, and why: the only such list.

Each entry names the one request (or the events) of a scenario that may differ; everything
else in that scenario has to be as recorded.
"""

import ssl
from dataclasses import dataclass
from enum import Enum


class Why(Enum):
    """What kind of difference it is."""

    OLD_TOOLS = "old tools' command"
    """Decided: what older tools send is taken, 11.1 has dropped it."""

    NO_MACHINE = "no machine"
    """Decided: migrationd has no vCPUs and no devices, and says so as QEMU does."""

    BAD_PEER = "bad peer"
    """Decided: a bad peer costs its own migration, and ``error-desc`` says why."""

    OTHER = "differs"


@dataclass(frozen=True, slots=True)
class Allowed:
    """A difference that is known.

    Attributes:
        request: Part of the request as it is compared, or ``events``.
        why: Its kind.
        reason: In words.
    """

    request: str
    why: Why
    reason: str


def _old(*requests: str) -> tuple[Allowed, ...]:
    reason = "what old tools still send is taken; 11.1 has dropped it"
    return tuple(Allowed(request, Why.OLD_TOOLS, reason) for request in requests)


def _no(reason: str, *requests: str) -> tuple[Allowed, ...]:
    return tuple(Allowed(request, Why.NO_MACHINE, reason) for request in requests)


def _other(reason: str, *requests: str) -> tuple[Allowed, ...]:
    return tuple(Allowed(request, Why.OTHER, reason) for request in requests)


DIFFERENCES: dict[str, tuple[Allowed, ...]] = {
    "announce_and_misc": _no("no CPU model is known", '"query-cpu-model-expansion"'),
    "cancel_setup": _other(
        "meant so: a connection attempt is given up at once, not when it times out",
        '"query-migrate"',
        '"migrate"',
        '"query-status"',
        "events",
    ),
    "incoming_garbage_stay": tuple(
        Allowed(request, Why.BAD_PEER, "a bad source is named, and the next one may come")
        for request in ('"query-migrate"', '"migrate-incoming"', "events")
    ),
    "legacy_commands": _old(
        '"migrate_set_speed"',
        '"migrate_set_downtime"',
        '"migrate-set-cache-size"',
        '"query-migrate-cache-size"',
        '"query-events"',
        '"query-cpus"',
        '"detach"',
    ),
    "libvirt_outgoing_precopy": _old(
        'asked as well: {"execute": "migrate", "arguments": {"detach": true',
        'not asked: {"execute": "migrate", "arguments": {"resume": false',
    ),
    "only_migratable": _no("no device model is known", '"device_add"'),
    "query_basics": (
        *_old('"query-migrate-cache-size"', '"query-events"', '"query-cpus"'),
        *_no("no TPM is known, and no memory is dumped", '"query-tpm-models"', '"query-dump-'),
    ),
    "query_command_line": _no(
        "options of a machine are not taken",
        '"option": "memory"',
        '"query-command-line-options"}',
    ),
    "query_schema_migration": _old('"query-qmp-schema"'),
}
"""Scenario to what may differ. What is identical after all is an error: the list stays true."""

if not getattr(ssl, "HAS_PSK", False):
    DIFFERENCES["tls_psk_migration"] = _other(
        "TLS with pre-shared keys needs Python 3.13", '"query-', "events"
    )

NOT_APPLICABLE: dict[str, str] = {
    "migrate_blocked": "a block driver of QEMU that blocks migration",
    "snapshot_hmp": "snapshots inside a disk image",
    "snapshot_jobs": "snapshots inside a disk image",
}
"""Scenario to what it is about that migrationd does not have."""

GUESTS: dict[str, str] = {
    "caps_conflicts": "none",
    "caps_each": "none",
    "caps_each_incoming": "none",
    "dirty_rate": "recorded",
}
"""Scenario to what it is played with, if not a workload: that one can be slowed down, as a QEMU's
guest can with KVM and a dirty ring, and the recorded ones ran without."""

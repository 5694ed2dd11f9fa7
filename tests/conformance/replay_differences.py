"""Where a replayed scenario may differ from QEMU 11.1's recording, and why: the only such list."""

import ssl

OLD_TOOLS = (
    "what old tools still send (detach, migrate_set_speed, query-events, ...) is taken; "
    "11.1 has dropped it"
)
NO_MACHINE = "migrationd runs no machine: it has no devices, vCPUs or firmware to answer for"
RETRY = (
    "meant so: migrate-incoming may be tried again after a failure, where QEMU has to be restarted"
)
PARKED = (
    "meant so: a parked guest executes nowhere here, so nothing stops at its source or runs at "
    "its destination"
)
PARKED_ENDS = PARKED + "; the script waits for RESUME and ends there: the rest is not played"
NOT_BUILT = "not built, refused by a typed error when it would begin: "

DIFFERENCES: dict[str, str] = {
    "announce_and_misc": NO_MACHINE,
    "cap_mismatch": PARKED,
    "cancel_setup": "meant so: a connection attempt is given up at once, not when it times out",
    "colo_xen": NOT_BUILT + "Xen's device state files",
    "dirty_rate": NO_MACHINE + "; and one measurement more is under way",
    "incoming_defer": RETRY,
    "incoming_garbage_stay": RETRY + "; and query-migrate says why it failed",
    "legacy_commands": OLD_TOOLS,
    "libvirt_outgoing_precopy": OLD_TOOLS,
    "migrate_bad_uri": NOT_BUILT + "RDMA; the text says so",
    "migrate_while_active": NO_MACHINE,
    "only_migratable": NO_MACHINE,
    "pause_before_switchover": "a migrate-continue meets 'device', where QEMU was faster",
    "postcopy_never_started": PARKED,
    "postcopy_pause_recover": PARKED_ENDS,
    "postcopy_preempt": PARKED,
    "postcopy_states": PARKED_ENDS,
    "postcopy_success": PARKED,
    "precopy_dirty_guest": "the workload writes more than the firmware: 'active' for longer",
    "proto_events_order": NO_MACHINE,
    "query_basics": NO_MACHINE + "; " + OLD_TOOLS,
    "query_command_line": NO_MACHINE,
    "query_qom": NO_MACHINE,
    "query_schema_migration": OLD_TOOLS,
}
"""Scenario to reason. One that is identical after all is an error: the list stays true."""

if not getattr(ssl, "HAS_PSK", False):
    DIFFERENCES["tls_psk_migration"] = "TLS with pre-shared keys needs Python 3.13"

NOT_APPLICABLE: dict[str, str] = {
    "background_snapshot_exec": "write protection of a guest that executes",
    "background_snapshot_file": "write protection of a guest that executes",
    "cpr_reboot_file": "restarts a host under a guest",
    "migrate_blocked": "a block driver of QEMU that blocks migration",
    "snapshot_hmp": "snapshots inside a disk image",
    "snapshot_jobs": "snapshots inside a disk image",
}
"""Scenario to what it is about that migrationd does not have."""

PARKED_GUEST = (
    "cap_mismatch",
    "postcopy_never_started",
    "postcopy_pause_recover",
    "postcopy_preempt",
    "postcopy_states",
    "postcopy_success",
)
"""Scenarios played with a parked guest, for an attached one does not do postcopy."""

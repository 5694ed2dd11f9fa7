"""COLO and Xen: no disk is replicated."""

from typing import cast

from migrationd.errors import QMPError
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.models import replication as models


def query_colo_status(call: Invocation, _: object) -> models.COLOStatus:
    """``query-colo-status``."""
    mode = call.control.colo_mode
    last_mode, reason = call.control.colo_exit
    return models.COLOStatus.make(
        mode=cast("models.COLOMode", mode),
        last_mode=cast("models.COLOMode", last_mode),
        reason=cast("models.COLOExitReason", reason),
    )


def colo_lost_heartbeat(call: Invocation, _: object) -> None:
    """``x-colo-lost-heartbeat``."""
    call.control.colo_lost_heartbeat()


async def xen_save_devices_state(call: Invocation, arguments: models.XenSaveDevicesState) -> None:
    """``xen-save-devices-state``; ``live`` is about disk images, and there is none."""
    await call.control.machine.save_devices(arguments.filename)


async def xen_load_devices_state(call: Invocation, arguments: models.XenLoadDevicesState) -> None:
    """``xen-load-devices-state``."""
    await call.control.machine.load_devices(arguments.filename)


def xen_set_global_dirty_log(call: Invocation, arguments: models.XenSetGlobalDirtyLog) -> None:
    """``xen-set-global-dirty-log``: a guest that does not execute dirties no page."""


def xen_set_replication(call: Invocation, arguments: models.XenSetReplication) -> None:
    """``xen-set-replication``: of all block devices, and there is none."""
    if arguments.enable and arguments.failover:
        raise QMPError("Parameter 'failover' is only for stopping replication")


def query_xen_replication_status(call: Invocation, _: object) -> models.ReplicationStatus:
    """``query-xen-replication-status``."""
    return models.ReplicationStatus.make(error=False)


def xen_colo_do_checkpoint(call: Invocation, _: object) -> None:
    """``xen-colo-do-checkpoint``: of all replicated block devices, and there is none."""


COMMANDS: tuple[CommandSpec, ...] = (
    command("query-colo-status", query_colo_status, returns=models.COLOStatus),
    command("x-colo-lost-heartbeat", colo_lost_heartbeat, features=("unstable",)),
    command("xen-save-devices-state", xen_save_devices_state, models.XenSaveDevicesState),
    command("xen-load-devices-state", xen_load_devices_state, models.XenLoadDevicesState),
    command("xen-set-global-dirty-log", xen_set_global_dirty_log, models.XenSetGlobalDirtyLog),
    command("xen-set-replication", xen_set_replication, models.XenSetReplication),
    command(
        "query-xen-replication-status",
        query_xen_replication_status,
        returns=models.ReplicationStatus,
    ),
    command("xen-colo-do-checkpoint", xen_colo_do_checkpoint),
)

"""COLO and Xen."""

from typing import Literal

from migrationd.qmp.models.base import QapiModel, optional

COLOMode = Literal["none", "primary", "secondary"]
COLOExitReason = Literal["none", "request", "error", "processing"]


class COLOStatus(QapiModel):
    """Return of ``query-colo-status``."""

    mode: COLOMode
    last_mode: COLOMode
    reason: COLOExitReason


class COLOExitEvent(QapiModel):
    """Data of the COLO_EXIT event."""

    mode: COLOMode
    reason: COLOExitReason


class UnplugPrimaryEvent(QapiModel):
    """Data of the UNPLUG_PRIMARY event."""

    device_id: str


class XenSaveDevicesState(QapiModel):
    """Arguments of ``xen-save-devices-state``."""

    filename: str
    live: bool = optional(since="2.11")


class XenLoadDevicesState(QapiModel):
    """Arguments of ``xen-load-devices-state``."""

    filename: str


class XenSetGlobalDirtyLog(QapiModel):
    """Arguments of ``xen-set-global-dirty-log``."""

    enable: bool


class XenSetReplication(QapiModel):
    """Arguments of ``xen-set-replication``."""

    enable: bool
    primary: bool
    failover: bool = optional()


class ReplicationStatus(QapiModel):
    """Return of ``query-xen-replication-status``."""

    error: bool
    desc: str = optional()

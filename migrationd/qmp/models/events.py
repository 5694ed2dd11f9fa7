"""The table of events: names and models of what they carry."""

from migrationd.qmp.models import control as control_models
from migrationd.qmp.models import jobs as jobs_models
from migrationd.qmp.models import migration as migration_models
from migrationd.qmp.models import replication as replication_models
from migrationd.qmp.models.base import QapiModel
from migrationd.qmp.models.control import Empty

EVENTS: dict[str, type[QapiModel]] = {
    "MIGRATION": migration_models.MigrationEvent,
    "MIGRATION_PASS": migration_models.MigrationPassEvent,
    "STOP": Empty,
    "RESUME": Empty,
    "SHUTDOWN": control_models.ShutdownEvent,
    "RESET": control_models.ShutdownEvent,
    "POWERDOWN": Empty,
    "SUSPEND": Empty,
    "WAKEUP": Empty,
    "JOB_STATUS_CHANGE": jobs_models.JobStatusChangeEvent,
    "COLO_EXIT": replication_models.COLOExitEvent,
    "UNPLUG_PRIMARY": replication_models.UnplugPrimaryEvent,
}

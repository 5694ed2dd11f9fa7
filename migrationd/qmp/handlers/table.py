"""The table of commands and of events."""

from typing import Any, cast

from migrationd.qmp.command import CommandSpec, Handler
from migrationd.qmp.handlers import control, fds, migrate, options
from migrationd.qmp.models import control as control_models
from migrationd.qmp.models import fds as fds_models
from migrationd.qmp.models import migration as migration_models
from migrationd.qmp.models.base import QapiModel
from migrationd.qmp.models.control import Empty


def _spec(
    name: str,
    handler: Any,  # noqa: ANN401  # each handler takes and returns its own models
    arguments: type[QapiModel] = Empty,
    returns: type[QapiModel] = Empty,
    *,
    returns_list: bool = False,
) -> CommandSpec:
    return CommandSpec(name, cast("Handler", handler), arguments, returns, returns_list)


COMMANDS: dict[str, CommandSpec] = {
    spec.name: spec
    for spec in (
        _spec("qmp_capabilities", control.qmp_capabilities, control_models.QmpCapabilities),
        _spec("query-version", control.query_version, returns=control_models.VersionInfo),
        _spec(
            "query-commands",
            control.query_commands,
            returns=control_models.CommandInfo,
            returns_list=True,
        ),
        _spec("query-status", control.query_status, returns=control_models.StatusInfo),
        _spec("query-name", control.query_name, returns=control_models.NameInfo),
        _spec("query-uuid", control.query_uuid, returns=control_models.UuidInfo),
        _spec("query-kvm", control.query_kvm, returns=control_models.KvmInfo),
        _spec("stop", control.stop),
        _spec("cont", control.cont),
        _spec("quit", control.quit_),
        _spec("getfd", fds.getfd, control_models.FdName),
        _spec("closefd", fds.closefd, control_models.FdName),
        _spec("add-fd", fds.add_fd, fds_models.AddFd, fds_models.AddfdInfo),
        _spec("remove-fd", fds.remove_fd, fds_models.RemoveFd),
        _spec("query-fdsets", fds.query_fdsets, returns=fds_models.FdsetInfo, returns_list=True),
        _spec("migrate", migrate.migrate, migration_models.Migrate),
        _spec("migrate-incoming", migrate.migrate_incoming, migration_models.MigrateIncoming),
        _spec("migrate_cancel", migrate.migrate_cancel),
        _spec("migrate-continue", migrate.migrate_continue, migration_models.MigrateContinue),
        _spec("query-migrate", migrate.query_migrate, returns=migration_models.MigrationInfoModel),
        _spec(
            "query-migrate-capabilities",
            options.query_capabilities,
            returns=migration_models.MigrationCapabilityStatus,
            returns_list=True,
        ),
        _spec(
            "migrate-set-capabilities",
            options.set_capabilities,
            migration_models.MigrateSetCapabilities,
        ),
        _spec(
            "query-migrate-parameters",
            options.query_parameters,
            returns=migration_models.MigrationParameters,
        ),
        _spec(
            "migrate-set-parameters",
            options.set_parameters,
            migration_models.MigrateSetParameters,
        ),
    )
}

EVENTS: dict[str, type[QapiModel]] = {
    "MIGRATION": migration_models.MigrationEvent,
    "MIGRATION_PASS": migration_models.MigrationPassEvent,
    "STOP": Empty,
    "RESUME": Empty,
    "SHUTDOWN": control_models.ShutdownEvent,
}

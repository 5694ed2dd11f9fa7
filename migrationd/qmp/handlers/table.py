"""The table of commands."""

from migrationd.qmp.command import CommandSpec, command
from migrationd.qmp.handlers import (
    control,
    dirty_rate,
    fds,
    human,
    introspection,
    jobs,
    legacy,
    machine,
    migrate,
    objects,
    options,
    replication,
    yank,
)
from migrationd.qmp.models import control as control_models
from migrationd.qmp.models import fds as fds_models
from migrationd.qmp.models import migration as migration_models

COMMANDS: dict[str, CommandSpec] = {
    spec.name: spec
    for spec in (
        command("qmp_capabilities", control.qmp_capabilities, control_models.QmpCapabilities),
        command("query-version", control.query_version, returns=control_models.VersionInfo),
        command(
            "query-commands",
            control.query_commands,
            returns=list[control_models.CommandInfo],
        ),
        command("query-status", control.query_status, returns=control_models.StatusInfo),
        command("query-name", control.query_name, returns=control_models.NameInfo),
        command("query-uuid", control.query_uuid, returns=control_models.UuidInfo),
        command(
            "query-kvm",
            control.query_kvm,
            returns=control_models.KvmInfo,
            features=("deprecated",),
        ),
        command("stop", control.stop),
        command("cont", control.cont),
        command("quit", control.quit_),
        command(
            "human-monitor-command",
            human.human_monitor_command,
            control_models.HumanMonitorCommand,
            str,
            features=("savevm-monitor-nodes",),
        ),
        command("getfd", fds.getfd, control_models.FdName),
        command("closefd", fds.closefd, control_models.FdName),
        command("add-fd", fds.add_fd, fds_models.AddFd, fds_models.AddfdInfo),
        command("remove-fd", fds.remove_fd, fds_models.RemoveFd),
        command("query-fdsets", fds.query_fdsets, returns=list[fds_models.FdsetInfo]),
        command("migrate", migrate.migrate, migration_models.Migrate),
        command("migrate-incoming", migrate.migrate_incoming, migration_models.MigrateIncoming),
        command("migrate_cancel", migrate.migrate_cancel),
        command("migrate-continue", migrate.migrate_continue, migration_models.MigrateContinue),
        command("migrate-start-postcopy", migrate.migrate_start_postcopy),
        command("migrate-pause", migrate.migrate_pause, allows_oob=True),
        command(
            "migrate-recover",
            migrate.migrate_recover,
            migration_models.MigrateRecover,
            allows_oob=True,
        ),
        command(
            "query-migrate", migrate.query_migrate, returns=migration_models.MigrationInfoModel
        ),
        command(
            "query-migrate-capabilities",
            options.query_capabilities,
            returns=list[migration_models.MigrationCapabilityStatus],
        ),
        command(
            "migrate-set-capabilities",
            options.set_capabilities,
            migration_models.MigrateSetCapabilities,
        ),
        command(
            "query-migrate-parameters",
            options.query_parameters,
            returns=migration_models.MigrationParameters,
        ),
        command(
            "migrate-set-parameters",
            options.set_parameters,
            migration_models.MigrateSetParameters,
        ),
        *introspection.COMMANDS,
        *machine.COMMANDS,
        *dirty_rate.COMMANDS,
        *yank.COMMANDS,
        *jobs.COMMANDS,
        *objects.COMMANDS,
        *replication.COMMANDS,
        *legacy.COMMANDS,
    )
}

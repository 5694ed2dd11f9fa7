"""Connections that hang are cut off; both commands may run out of band."""

from migrationd.errors import QMPError
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.models.yank import Yank, YankChardev, YankInstance, YankMigration


def query_yank(call: Invocation, _: object) -> list[YankChardev | YankMigration]:
    """``query-yank``: monitors on sockets, and a migration that has connections."""
    machine = call.control.machine
    found: list[YankChardev | YankMigration] = [
        YankChardev.make(type="chardev", id=label)
        for label, chardev in machine.chardevs().items()
        if chardev.is_socket
    ]
    if machine.is_migration_yankable:
        found.append(YankMigration.make(type="migration"))
    return found


def yank(call: Invocation, arguments: Yank) -> None:
    """``yank``: all of them, or nothing if one is not there."""
    machine = call.control.machine
    present = query_yank(call, None)
    if any(instance not in present for instance in arguments.instances):
        raise QMPError("Instance not found", "DeviceNotFound")
    for instance in arguments.instances:
        if isinstance(instance, YankChardev):
            machine.chardevs()[instance.id].disconnect()
        else:
            machine.yank_migration()


COMMANDS: tuple[CommandSpec, ...] = (
    command("query-yank", query_yank, returns=list[YankInstance], allows_oob=True),
    command("yank", yank, Yank, allows_oob=True),
)

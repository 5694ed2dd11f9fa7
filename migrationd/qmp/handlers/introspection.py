"""What the monitor and the command line understand."""

import functools
import json
from collections.abc import Iterable

from migrationd.errors import QMPError
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.introspect import CommandForm, introspect
from migrationd.qmp.message import Json
from migrationd.qmp.models.events import EVENTS
from migrationd.qmp.models.introspection import (
    CommandLineOptionInfo,
    CommandLineParameterInfo,
    QueryCommandLineOptions,
    SchemaInfo,
)

_NAME_PARAMETERS = (
    ("guest", "string", "name of the guest, for query-name and for its place in -ram-dir"),
    ("process", "string", "accepted, has no effect"),
    ("debug-threads", "boolean", "accepted, has no effect"),
)

_CHARDEV_PARAMETERS = tuple(
    (name, "boolean" if name in ("server", "wait", "nodelay") else "string", "")
    for name in ("nodelay", "wait", "server", "fd", "port", "host", "path", "backend")
)
_MON_PARAMETERS = (("pretty", "boolean", ""), ("chardev", "string", ""), ("mode", "string", ""))

OPTION_PARAMETERS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "chardev": _CHARDEV_PARAMETERS,
    "mon": _MON_PARAMETERS,
    "name": _NAME_PARAMETERS,
}
"""Options whose value is ``key=value`` pairs: name, type and help of each key.

As in QEMU, an option whose value is one text is not listed.
"""


def entities(commands: Iterable[CommandSpec]) -> list[dict[str, object]]:
    """What ``query-qmp-schema`` returns of these commands and all events, as JSON values."""
    forms = [
        CommandForm(spec.name, spec.arguments, spec.returns, spec.features, spec.allows_oob)
        for spec in commands
    ]
    return introspect(forms, EVENTS)


@functools.cache
def _schema_text(commands: tuple[CommandSpec, ...]) -> Json:
    return Json(json.dumps(entities(commands)))


def query_qmp_schema(call: Invocation, _: object) -> Json:
    """``query-qmp-schema``: the table does not change while the process lives."""
    return _schema_text(tuple(call.commands.values()))


def query_command_line_options(
    call: Invocation, arguments: QueryCommandLineOptions
) -> list[CommandLineOptionInfo]:
    """``query-command-line-options``."""
    wanted = arguments.option
    if wanted is not None and wanted not in OPTION_PARAMETERS:
        raise QMPError(f"invalid option name: {wanted}")
    return [
        CommandLineOptionInfo.make(
            option=option,
            parameters=[
                CommandLineParameterInfo.make(name=name, type=kind, help=text or None)
                for name, kind, text in parameters
            ],
        )
        for option, parameters in OPTION_PARAMETERS.items()
        if wanted in (None, option)
    ]


COMMANDS = (
    command("query-qmp-schema", query_qmp_schema, returns=list[SchemaInfo]),
    command(
        "query-command-line-options",
        query_command_line_options,
        QueryCommandLineOptions,
        list[CommandLineOptionInfo],
    ),
)

"""``human-monitor-command``: a line of the human monitor, and the text that it prints.

Its tables are a fiftieth of the process and most daemons never print one: they are imported late.
"""

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from migrationd.errors import QMPError
from migrationd.qmp.command import Invocation
from migrationd.qmp.context import GuestSnapshots
from migrationd.qmp.models.control import HumanMonitorCommand


async def human_monitor_command(call: Invocation, arguments: HumanMonitorCommand) -> str:
    """``human-monitor-command``: mistakes in the line are text, not errors."""
    # Tools name the first CPU always; nothing that is printed here depends on it.
    if arguments.cpu_index:
        raise QMPError("Parameter 'cpu-index' expects a CPU number")
    await asyncio.to_thread(importlib.import_module, "migrationd.qmp.hmp.shell")
    from migrationd.qmp.hmp.shell import HumanShell

    return await HumanShell(_Commands(call)).execute(arguments.command_line)


class _Commands:
    """QMP commands for the human monitor; implements ``migrationd.qmp.hmp.table.Qmp``."""

    def __init__(self, call: Invocation) -> None:
        self._call = call

    @property
    def only_migratable(self) -> bool:
        return self._call.control.only_migratable

    @property
    def snapshots(self) -> GuestSnapshots:
        return self._call.control.machine.snapshots

    def has(self, name: str) -> bool:
        return name in self._call.commands

    def accepts(self, name: str, member: str, value: str) -> bool:
        try:
            self._call.commands[name].arguments.model_validate({member: value})
        except ValidationError:
            return False
        return True

    async def perform(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401
        return await self._call.perform(name, arguments or {})

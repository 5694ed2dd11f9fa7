"""One line of the human monitor: which command it is, and what is printed.

Reference: how QEMU 11.1 takes a line apart, and its texts.
"""

import re
from collections.abc import Iterable, Sequence

from migrationd.errors import MigrationdError, QMPError
from migrationd.qmp.hmp.arguments import parse, read_word, rest
from migrationd.qmp.hmp.errors import PlainError, UsageError
from migrationd.qmp.hmp.table import COMMANDS, INFO, HumanCommand, Qmp, Values

_NAME = re.compile(r"\s*([^\s/]*)\s*")


class HumanShell:
    """Performs lines.

    Args:
        qmp: What they are done with.
    """

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        available = [command for command in COMMANDS if qmp.has(command.needs)]
        name = rest("name", optional=True)
        self._commands = [
            *available,
            HumanCommand("help|?", (name,), "[cmd]", "show the help", "", self._help),
            HumanCommand("info", (rest("item", optional=True),), "[subcommand]",
                         "show the state of the guest and its migration", "", self._info),
        ]  # fmt: skip
        self._info_commands = [command for command in INFO if qmp.has(command.needs)]

    async def execute(self, line: str) -> str:
        """Perform a line.

        Returns:
            What it prints, with CR LF at the end of each line; errors are text as well.
        """
        return (await self._execute(line)).replace("\n", "\r\n")

    async def _execute(self, line: str) -> str:
        if not line.strip():
            return ""
        command, name, at = self._find(line)
        if command is None:
            return f"unknown command: '{line[:at]}'\n"
        try:
            values = parse(line[at:], command.arguments, name)
        except UsageError as error:
            return f'{error.text}Try "help {line[:at].rstrip()}" for more information\n'
        try:
            return await command.run(self._qmp, values)
        except PlainError as error:
            text = str(error)
            return text if text.endswith("\n") else f"Error: {text}\n"
        except QMPError as error:
            return f"Error: {error.desc}\n"
        except MigrationdError as error:
            return f"Error: {error}\n"

    def _find(self, line: str) -> tuple[HumanCommand | None, str, int]:
        """The command, how texts call it, and where its arguments begin.

        For an unknown one, where the words end that were looked at.
        """
        match = _NAME.match(line)
        assert match is not None
        command = _called(self._commands, match[1])
        if command is None or (command.names == "info" and line[match.end(1) :][:1] == "/"):
            return None, "", match.end(1)
        if command.names == "info" and match.end() < len(line):
            match = _NAME.match(line, match.end())
            assert match is not None
            command = _called(self._info_commands, match[1])
            if command is None:
                return None, "", match.end(1)
        if line[match.end(1) :][:1] == "/":
            return command, command.names, match.end(1)
        return command, command.names, match.end()

    async def _help(self, _: Qmp, values: Values) -> str:
        words = []
        at, text = 0, str(values.get("name", ""))
        word, at = read_word(text, at)
        while word is not None:
            words.append(word)
            word, at = read_word(text, at)
        if not words:
            return _listing(self._commands)
        command = _called(self._commands, words[0])
        if command is None:
            return f"unknown command: '{words[0]}'\n"
        if command.names != "info":
            return _listing([command])
        if len(words) == 1:
            return _listing(self._info_commands, "info ")
        command = _called(self._info_commands, words[1])
        if command is None:
            return f"unknown command: 'info {words[1]}'\n"
        return _listing([command], "info ")

    async def _info(self, _: Qmp, values: Values) -> str:
        return _listing(self._info_commands, "info ")


def _called(commands: Iterable[HumanCommand], name: str) -> HumanCommand | None:
    return next((command for command in commands if command.is_called(name)), None)


def _listing(commands: Sequence[HumanCommand], prefix: str = "") -> str:
    ordered = sorted(commands, key=lambda command: command.names)
    return "".join(
        f"{prefix}{command.names} {command.shown} -- {command.help}\n" for command in ordered
    )

"""What a command is: its models, its flags and its handler."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from migrationd.qmp.context import Control
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.models.base import QapiModel
from migrationd.qmp.session import Session

Returned = QapiModel | Sequence[QapiModel] | None
"""What a handler gives back; None is a success without a value."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """Where a command comes from.

    Attributes:
        control: The guest.
        session: The client's session.
        fds: Descriptors that came with the request, and those of its monitor.
        command_names: Names of all commands.
    """

    control: Control
    session: Session
    fds: RequestFds
    command_names: tuple[str, ...]


Handler = Callable[[Invocation, QapiModel], Returned | Awaitable[Returned]]
"""A coroutine function only where something has to be awaited: others run without a task."""


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """One command.

    Attributes:
        name: QMP name.
        handler: Performs it.
        arguments: Model of its arguments.
        returns: Model of what it returns.
        returns_list: Whether it returns a list of that model.
        allows_oob: Whether it may run out of band.
        deprecated: Whether tools should stop using it.
        since: QEMU release that brought it.
    """

    name: str
    handler: Handler
    arguments: type[QapiModel]
    returns: type[QapiModel]
    returns_list: bool = False
    allows_oob: bool = False
    deprecated: bool = False
    since: str = ""

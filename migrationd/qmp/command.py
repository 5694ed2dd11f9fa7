"""What a command is: its models, its flags and its handler."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from migrationd.qmp.context import Control
from migrationd.qmp.fds import FdStore
from migrationd.qmp.models.base import QapiModel
from migrationd.qmp.session import Session

Returned = dict[str, object] | list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Invocation:
    """Where a command comes from.

    Attributes:
        control: The guest.
        session: The client's session.
        fds: Descriptors of its monitor.
        command_names: Names of all commands.
    """

    control: Control
    session: Session
    fds: FdStore
    command_names: tuple[str, ...]


Handler = Callable[[Invocation, QapiModel], Awaitable[Returned]]


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
    """

    name: str
    handler: Handler
    arguments: type[QapiModel]
    returns: type[QapiModel]
    returns_list: bool = False
    allows_oob: bool = False
    deprecated: bool = False

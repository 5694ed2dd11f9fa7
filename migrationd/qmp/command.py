"""What a command is: its models, its flags and its handler."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from migrationd.qmp.context import Control
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.message import Json
from migrationd.qmp.models.base import QapiModel
from migrationd.qmp.models.control import Empty
from migrationd.qmp.session import Session

Returned = QapiModel | Sequence[QapiModel] | Sequence[str] | str | int | Json | None
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
        returns: What it returns: a model, a list of one, ``str`` or ``int``.
        allows_oob: Whether it may run out of band.
        features: Features that the introspection shows, ``deprecated`` among them.
    """

    name: str
    handler: Handler
    arguments: type[QapiModel]
    returns: Any
    allows_oob: bool = False
    features: tuple[str, ...] = ()


def command(
    name: str,
    handler: Any,  # noqa: ANN401  # each handler takes and returns its own models
    arguments: type[QapiModel] = Empty,
    returns: Any = Empty,  # noqa: ANN401  # an annotation
    *,
    allows_oob: bool = False,
    features: tuple[str, ...] = (),
) -> CommandSpec:
    """A :class:`CommandSpec`."""
    return CommandSpec(name, cast("Handler", handler), arguments, returns, allows_oob, features)

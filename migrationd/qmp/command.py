"""What a command is: its models, its flags and its handler."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from migrationd.qmp.context import Control
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.message import Json
from migrationd.qmp.models.base import QapiModel, parse_arguments
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
        commands: All commands, by name.
    """

    control: Control
    session: Session
    fds: RequestFds
    commands: "Mapping[str, CommandSpec]"

    @property
    def command_names(self) -> tuple[str, ...]:
        """Names of all commands."""
        return tuple(self.commands)

    async def perform(self, name: str, arguments: Mapping[str, object]) -> object:
        """Perform another command on behalf of this one; what it returns as a JSON value.

        Raises:
            MigrationdError: It failed.
        """
        spec = self.commands[name]
        returned = spec.handler(self, parse_arguments(spec.arguments, arguments))
        return to_wire(await returned if isinstance(returned, Awaitable) else returned)


Handler = Callable[[Invocation, QapiModel], Returned | Awaitable[Returned]]
"""A coroutine function only where something has to be awaited: others run without a task."""


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """One command.

    Attributes:
        name: QMP name.
        handler: Performs it.
        arguments: Model of its arguments, or a union of models as an annotation.
        returns: What it returns: a model, a list of one, ``str`` or ``int``.
        allows_oob: Whether it may run out of band.
        features: Features that the introspection shows, ``deprecated`` among them.
    """

    name: str
    handler: Handler
    arguments: Any
    returns: Any
    allows_oob: bool = False
    features: tuple[str, ...] = ()


def to_wire(returned: Returned) -> object:
    """A returned model, or a list of them, as a JSON value; absent members are left out."""
    if returned is None:
        return {}
    if isinstance(returned, QapiModel):
        return returned.__pydantic_serializer__.to_python(
            returned, by_alias=True, exclude_none=True
        )
    if isinstance(returned, str | int | Json):
        return returned
    return [
        item if isinstance(item, str) else item.model_dump(by_alias=True, exclude_none=True)
        for item in returned
    ]


def command(
    name: str,
    handler: Any,  # noqa: ANN401  # each handler takes and returns its own models
    arguments: Any = Empty,  # noqa: ANN401  # an annotation
    returns: Any = Empty,  # noqa: ANN401  # an annotation
    *,
    allows_oob: bool = False,
    features: tuple[str, ...] = (),
) -> CommandSpec:
    """A :class:`CommandSpec`."""
    return CommandSpec(name, cast("Handler", handler), arguments, returns, allows_oob, features)

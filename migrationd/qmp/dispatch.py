"""A request to its handler, and what came of it to a reply."""

import logging

from migrationd.errors import MigrationdError, QMPError
from migrationd.qmp.command import Invocation, Returned
from migrationd.qmp.context import Control
from migrationd.qmp.errors import to_qmp
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.base import QapiModel, parse_arguments
from migrationd.qmp.session import Request, RequestError, Session, failure, success

log = logging.getLogger(__name__)

_NAMES = tuple(COMMANDS)


async def answer(
    control: Control, value: object, session: Session, fds: RequestFds
) -> dict[str, object]:
    """Perform one request.

    Args:
        control: The guest.
        value: The JSON value that a client sent.
        session: The client's session.
        fds: Descriptors that it can use.

    Returns:
        The reply; every error becomes one.
    """
    try:
        request = session.check_request(value)
    except RequestError as refused:
        return failure(refused.id, refused.error)
    try:
        return success(request.id, to_wire(await _perform(request, control, session, fds)))
    except MigrationdError as error:
        return failure(request.id, to_qmp(error))
    except Exception as error:  # a defect of ours must not end the monitor
        log.exception("internal error in '%s'", request.command)
        return failure(request.id, QMPError(f"internal error: {error!r}"))


def to_wire(returned: Returned) -> object:
    """A returned model, or a list of them, as a JSON value; absent members are left out."""
    if returned is None:
        return {}
    if isinstance(returned, QapiModel):
        return returned.model_dump(by_alias=True, exclude_none=True)
    return [model.model_dump(by_alias=True, exclude_none=True) for model in returned]


async def _perform(
    request: Request, control: Control, session: Session, fds: RequestFds
) -> Returned:
    spec = COMMANDS.get(request.command)
    if spec is None:
        raise QMPError(f"The command {request.command} has not been found", "CommandNotFound")
    if request.is_oob and not spec.allows_oob:
        raise QMPError(f"The command {request.command} does not support OOB")
    arguments = parse_arguments(spec.arguments, request.arguments)
    return await spec.handler(Invocation(control, session, fds, _NAMES), arguments)

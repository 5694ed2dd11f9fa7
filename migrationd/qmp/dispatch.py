"""A request to its handler, and what came of it to a reply."""

import logging
from collections.abc import Awaitable

from migrationd.errors import MigrationdError, QMPError
from migrationd.qmp.command import Invocation, Returned, to_wire
from migrationd.qmp.context import Control
from migrationd.qmp.errors import to_qmp
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.base import QapiModel, parse_arguments
from migrationd.qmp.session import Request, RequestError, Session, failure, success

log = logging.getLogger(__name__)

Reply = dict[str, object]


def answer(
    control: Control, value: object, session: Session, fds: RequestFds
) -> Reply | Awaitable[Reply]:
    """Perform one request.

    Args:
        control: The guest.
        value: The JSON value that a client sent.
        session: The client's session.
        fds: Descriptors that it can use.

    Returns:
        The reply, or what has to be awaited for it; every error becomes one.
    """
    try:
        request = session.check_request(value)
    except RequestError as refused:
        return failure(refused.id, refused.error)
    try:
        returned = _perform(request, control, session, fds)
        if isinstance(returned, Awaitable):
            return _reply_later(request, returned)
        return success(request.id, to_wire(returned))
    except Exception as error:
        return _failed(request, error)


async def _reply_later(request: Request, returned: Awaitable[Returned]) -> Reply:
    try:
        return success(request.id, to_wire(await returned))
    except Exception as error:
        return _failed(request, error)


def _failed(request: Request, error: Exception) -> Reply:
    """An error of ours in the client's words; a defect must not end the monitor."""
    if isinstance(error, MigrationdError):
        return failure(request.id, to_qmp(error))
    log.error("internal error in '%s'", request.command, exc_info=error)
    return failure(request.id, QMPError(f"internal error: {error!r}"))


def _perform(
    request: Request, control: Control, session: Session, fds: RequestFds
) -> Returned | Awaitable[Returned]:
    spec = COMMANDS.get(request.command)
    if spec is None:
        raise QMPError(f"The command {request.command} has not been found", "CommandNotFound")
    if request.is_oob and not spec.allows_oob:
        raise QMPError(f"The command {request.command} does not support OOB")
    arguments: QapiModel = parse_arguments(spec.arguments, request.arguments)
    return spec.handler(Invocation(control, session, fds, COMMANDS), arguments)

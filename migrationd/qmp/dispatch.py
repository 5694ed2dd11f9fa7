"""A request to its handler, and what came of it to a reply."""

import logging

from migrationd.errors import MigrationdError, QMPError
from migrationd.qmp.command import Invocation
from migrationd.qmp.context import Control
from migrationd.qmp.errors import to_qmp
from migrationd.qmp.fds import FdStore
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.base import parse_arguments
from migrationd.qmp.session import Request, RequestError, Session, failure, success

log = logging.getLogger(__name__)

_NAMES = tuple(COMMANDS)


async def answer(
    control: Control, value: object, session: Session, fds: FdStore
) -> dict[str, object]:
    """Perform one request.

    Args:
        control: The guest.
        value: The JSON value that a client sent.
        session: The client's session.
        fds: Descriptors of its monitor.

    Returns:
        The reply; every error becomes one.
    """
    try:
        request = session.check_request(value)
    except RequestError as refused:
        return failure(refused.id, refused.error)
    try:
        return success(request.id, await _perform(request, control, session, fds))
    except MigrationdError as error:
        return failure(request.id, to_qmp(error))
    except Exception as error:  # a defect of ours must not end the monitor
        log.exception("internal error in '%s'", request.command)
        return failure(request.id, QMPError(f"internal error: {error!r}"))


async def _perform(request: Request, control: Control, session: Session, fds: FdStore) -> object:
    spec = COMMANDS.get(request.command)
    if spec is None:
        raise QMPError(f"The command {request.command} has not been found", "CommandNotFound")
    arguments = parse_arguments(spec.arguments, request.arguments)
    return await spec.handler(Invocation(control, session, fds, _NAMES), arguments)

"""Capabilities and parameters."""

from migrationd.qmp.command import Invocation, Returned
from migrationd.qmp.models.migration import MigrateSetCapabilities, MigrateSetParameters


async def query_capabilities(call: Invocation, _: object) -> Returned:
    """``query-migrate-capabilities``."""
    return [
        {"state": state, "capability": name}
        for name, state in call.control.options.capabilities.items()
    ]


async def set_capabilities(call: Invocation, arguments: MigrateSetCapabilities) -> Returned:
    """``migrate-set-capabilities``: all or nothing; refused while a migration runs."""
    call.control.check_capabilities_may_change()
    call.control.options.set_capabilities(
        [(item.capability, item.state) for item in arguments.capabilities]
    )
    return {}


async def query_parameters(call: Invocation, _: object) -> Returned:
    """``query-migrate-parameters``."""
    return dict(call.control.options.parameters)


async def set_parameters(call: Invocation, arguments: MigrateSetParameters) -> Returned:
    """``migrate-set-parameters``: all or nothing, also while a migration runs."""
    given = arguments.model_dump(by_alias=True, exclude_unset=True)
    for name in arguments.nullable & given.keys():
        given[name] = given[name] or ""
    call.control.options.set_parameters(given)
    call.control.parameters_changed()
    return {}

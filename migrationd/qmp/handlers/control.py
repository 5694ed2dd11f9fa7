"""The protocol itself, run state, identity and descriptors."""

from migrationd.qmp.command import Invocation, Returned
from migrationd.qmp.models.control import FdName, QmpCapabilities
from migrationd.qmp.version import VERSION


async def qmp_capabilities(call: Invocation, arguments: QmpCapabilities) -> Returned:
    """``qmp_capabilities``."""
    call.session.negotiate(list(arguments.enable))
    return {}


async def query_version(call: Invocation, _: object) -> Returned:
    """``query-version``."""
    return VERSION


async def query_commands(call: Invocation, _: object) -> Returned:
    """``query-commands``."""
    return [{"name": name} for name in call.command_names]


async def query_status(call: Invocation, _: object) -> Returned:
    """``query-status``."""
    return {"status": call.control.run_state, "running": call.control.running}


async def query_name(call: Invocation, _: object) -> Returned:
    """``query-name``."""
    name = call.control.guest_name
    return {} if name is None else {"name": name}


async def query_uuid(call: Invocation, _: object) -> Returned:
    """``query-uuid``: all zero when there is none."""
    uuid = call.control.guest_uuid
    return {"UUID": str(uuid) if uuid else "00000000-0000-0000-0000-000000000000"}


async def query_kvm(call: Invocation, _: object) -> Returned:
    """``query-kvm``: nothing executes here."""
    return {"enabled": False, "present": False}


async def stop(call: Invocation, _: object) -> Returned:
    """``stop``."""
    call.control.stop()
    return {}


async def cont(call: Invocation, _: object) -> Returned:
    """``cont``."""
    call.control.cont()
    return {}


async def quit_(call: Invocation, _: object) -> Returned:
    """``quit``."""
    call.control.quit()
    return {}


async def getfd(call: Invocation, arguments: FdName) -> Returned:
    """``getfd``."""
    call.fds.name(arguments.fdname)
    return {}


async def closefd(call: Invocation, arguments: FdName) -> Returned:
    """``closefd``."""
    call.fds.close(arguments.fdname)
    return {}

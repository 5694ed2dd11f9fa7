"""The protocol itself, run state, identity and descriptors."""

from uuid import UUID

from migrationd.qmp.command import Invocation
from migrationd.qmp.models.control import (
    CommandInfo,
    KvmInfo,
    NameInfo,
    QmpCapabilities,
    StatusInfo,
    UuidInfo,
    VersionInfo,
)
from migrationd.qmp.version import VERSION


def qmp_capabilities(call: Invocation, arguments: QmpCapabilities) -> None:
    """``qmp_capabilities``."""
    call.session.negotiate(list(arguments.enable))


def query_version(call: Invocation, _: object) -> VersionInfo:
    """``query-version``."""
    return VersionInfo.model_validate(VERSION)


def query_commands(call: Invocation, _: object) -> list[CommandInfo]:
    """``query-commands``."""
    return [CommandInfo.make(name=name) for name in call.command_names]


def query_status(call: Invocation, _: object) -> StatusInfo:
    """``query-status``."""
    control = call.control
    return StatusInfo.make(status=control.run_state, running=control.running)


def query_name(call: Invocation, _: object) -> NameInfo:
    """``query-name``."""
    return NameInfo.make(name=call.control.guest_name)


def query_uuid(call: Invocation, _: object) -> UuidInfo:
    """``query-uuid``: all zero when there is none."""
    return UuidInfo.make(UUID=str(call.control.guest_uuid or UUID(int=0)))


def query_kvm(call: Invocation, _: object) -> KvmInfo:
    """``query-kvm``: nothing executes here."""
    return KvmInfo.make(enabled=False, present=False)


async def stop(call: Invocation, _: object) -> None:
    """``stop``."""
    await call.control.stop()


async def cont(call: Invocation, _: object) -> None:
    """``cont``."""
    await call.control.cont()


def quit_(call: Invocation, _: object) -> None:
    """``quit``."""
    call.control.quit()

"""Commands that start and steer migrations."""

from migrationd.errors import QMPError
from migrationd.migration.info import MigrationInfo, RamStats
from migrationd.qmp.command import Invocation, Returned
from migrationd.qmp.context import MigrationChannel
from migrationd.qmp.models.migration import (
    Migrate,
    MigrateContinue,
    MigrateIncoming,
    MigrationChannelModel,
)
from migrationd.transport.address import address_from_qapi, parse_uri

_RAM_NAMES = {name: name.replace("_", "-") for name in RamStats.__slots__}


async def migrate(call: Invocation, arguments: Migrate) -> Returned:
    """``migrate``."""
    _check_one_form(arguments)
    if arguments.uri:
        channels = [MigrationChannel("main", parse_uri(arguments.uri))]
    else:
        channels = _channels(arguments.channels)
    call.control.migrate(channels, resume=arguments.resume, fds=call.fds.take)
    return {}


async def migrate_incoming(call: Invocation, arguments: MigrateIncoming) -> Returned:
    """``migrate-incoming``."""
    _check_one_form(arguments)
    if arguments.uri:
        channels = [MigrationChannel("main", parse_uri(arguments.uri))]
    else:
        if len(arguments.channels) > 1 or arguments.channels[0].channel_type != "main":
            raise QMPError("Channel list must have only one entry, for type 'main'")
        channels = _channels(arguments.channels)
    await call.control.migrate_incoming(
        channels, exit_on_error=arguments.exit_on_error, fds=call.fds.take
    )
    return {}


async def migrate_cancel(call: Invocation, _: object) -> Returned:
    """``migrate_cancel``."""
    call.control.migrate_cancel()
    return {}


async def migrate_continue(call: Invocation, arguments: MigrateContinue) -> Returned:
    """``migrate-continue``."""
    call.control.migrate_continue(arguments.state)
    return {}


async def query_migrate(call: Invocation, _: object) -> Returned:
    """``query-migrate``: the destination's part first, the source's over it."""
    out: dict[str, object] = {}
    for info in (call.control.incoming_info(), call.control.outgoing_info()):
        if info is not None:
            out |= _info_members(info)
    return out


def _info_members(info: MigrationInfo) -> dict[str, object]:
    members: dict[str, object | None] = {
        "status": info.status,
        "total-time": info.total_time_ms,
        "setup-time": info.setup_time_ms,
        "downtime": info.downtime_ms,
        "expected-downtime": info.expected_downtime_ms,
        "remaining": info.remaining_bytes,
        "error-desc": info.error_desc,
        "blocked-reasons": list(info.blocked_reasons) or None,
        "socket-address": list(info.socket_address) or None,
        "ram": _ram_members(info.ram),
    }
    return {name: value for name, value in members.items() if value is not None}


def _ram_members(ram: RamStats | None) -> dict[str, object] | None:
    if ram is None:
        return None
    return {wire: getattr(ram, name) for name, wire in _RAM_NAMES.items()}


def _check_one_form(arguments: Migrate | MigrateIncoming) -> None:
    if bool(arguments.uri) == bool(arguments.channels):
        raise QMPError("need either 'uri' or 'channels' argument")


def _channels(models: list[MigrationChannelModel]) -> list[MigrationChannel]:
    types = [model.channel_type for model in models]
    for name in ("main", "cpr"):
        if types.count(name) > 1:
            raise QMPError(f"Channel list has more than one {name} entry")
    if "main" not in types:
        raise QMPError("Channel list has no main entry")
    if "cpr" in types:
        raise QMPError("The cpr channel is not supported in this version of migrationd")
    return [
        MigrationChannel(
            model.channel_type, address_from_qapi(model.addr.model_dump(by_alias=True))
        )
        for model in models
    ]

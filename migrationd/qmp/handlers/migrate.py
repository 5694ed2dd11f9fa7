"""Commands that start and steer migrations."""

from pydantic import ConfigDict, TypeAdapter

from migrationd.errors import QMPError
from migrationd.migration.info import MigrationInfo, RamStats, XbzrleStats
from migrationd.qmp.command import Invocation
from migrationd.qmp.context import MigrationChannel
from migrationd.qmp.models.address import SocketAddress
from migrationd.qmp.models.migration import (
    Migrate,
    MigrateContinue,
    MigrateIncoming,
    MigrateRecover,
    MigrationChannelModel,
    MigrationInfoModel,
    MigrationStats,
    XBZRLECacheStats,
)
from migrationd.transport.address import address_from_qapi, parse_uri

_ADDRESSES: TypeAdapter[SocketAddress] = TypeAdapter(
    SocketAddress, config=ConfigDict(defer_build=True)
)


def migrate(call: Invocation, arguments: Migrate) -> None:
    """``migrate``."""
    if _has_uri(arguments):
        channels = [MigrationChannel("main", parse_uri(arguments.uri))]
    else:
        channels = _channels(arguments.channels)
    call.control.outgoing.migrate(channels, resume=arguments.resume, fds=call.fds.take)


async def migrate_incoming(call: Invocation, arguments: MigrateIncoming) -> None:
    """``migrate-incoming``."""
    call.control.incoming.check_may_start()
    if _has_uri(arguments):
        channels = [MigrationChannel("main", parse_uri(arguments.uri))]
    else:
        if len(arguments.channels) > 1 or arguments.channels[0].channel_type != "main":
            raise QMPError("Channel list must have only one entry, for type 'main'")
        channels = _channels(arguments.channels)
    await call.control.incoming.start(
        channels, exit_on_error=arguments.exit_on_error, fds=call.fds.take
    )


def migrate_cancel(call: Invocation, _: object) -> None:
    """``migrate_cancel``."""
    call.control.outgoing.cancel()


def migrate_continue(call: Invocation, arguments: MigrateContinue) -> None:
    """``migrate-continue``."""
    call.control.outgoing.continue_from(arguments.state)


def migrate_start_postcopy(call: Invocation, _: object) -> None:
    """``migrate-start-postcopy``."""
    call.control.outgoing.start_postcopy()


def migrate_pause(call: Invocation, _: object) -> None:
    """``migrate-pause``."""
    call.control.migrate_pause()


async def migrate_recover(call: Invocation, arguments: MigrateRecover) -> None:
    """``migrate-recover``."""
    call.control.incoming.check_recovery_may_start()
    await call.control.incoming.recover(parse_uri(arguments.uri), fds=call.fds.take)


def query_migrate(call: Invocation, _: object) -> MigrationInfoModel:
    """``query-migrate``: the destination's part first, the source's over it."""
    members: dict[str, object] = {}
    for info in (call.control.incoming.info(), call.control.outgoing.info()):
        if info is not None:
            members |= _info_members(info)
    if blockers := call.control.machine.blockers:
        members["blocked_reasons"] = [f"non-migratable device: {name}" for name in blockers]
    if "ram" in members and call.control.options.capabilities["xbzrle"]:
        members.setdefault("xbzrle_cache", _unused_cache(call))
    return MigrationInfoModel.make(**members)


def _unused_cache(call: Invocation) -> XBZRLECacheStats:
    """Counters of XBZRLE where no page goes out twice."""
    return XBZRLECacheStats.make(
        cache_size=call.control.options.parameters["xbzrle-cache-size"],
        bytes=0,
        pages=0,
        cache_miss=0,
        cache_miss_rate=0.0,
        encoding_rate=0.0,
        overflow=0,
    )


def _info_members(info: MigrationInfo) -> dict[str, object]:
    members: dict[str, object | None] = {
        "status": info.status,
        "total_time": info.total_time_ms,
        "setup_time": info.setup_time_ms,
        "downtime": info.downtime_ms,
        "expected_downtime": info.expected_downtime_ms,
        "remaining": info.remaining_bytes,
        "cpu_throttle_percentage": info.cpu_throttle_percentage,
        "error_desc": info.error_desc,
        "socket_address": [_ADDRESSES.validate_python(item) for item in info.socket_address]
        or None,
        "ram": _ram(info.ram),
        "xbzrle_cache": _xbzrle(info.xbzrle),
        "dirty_limit_throttle_time_per_round": info.dirty_limit_throttle_us,
        "postcopy_blocktime": info.postcopy_blocktime_ms,
        "postcopy_vcpu_blocktime": info.postcopy_vcpu_blocktime_ms,
        "postcopy_vcpu_latency": info.postcopy_vcpu_latency_ns,
        "postcopy_non_vcpu_latency": info.postcopy_non_vcpu_latency_ns,
        "postcopy_latency": info.postcopy_latency_ns,
        "postcopy_latency_dist": info.postcopy_latency_dist,
    }
    return {name: value for name, value in members.items() if value is not None}


def _ram(ram: RamStats | None) -> MigrationStats | None:
    if ram is None:
        return None
    return MigrationStats.make(**{name: getattr(ram, name) for name in MigrationStats.model_fields})


def _xbzrle(stats: XbzrleStats | None) -> XBZRLECacheStats | None:
    if stats is None:
        return None
    names = XBZRLECacheStats.model_fields
    return XBZRLECacheStats.make(**{name: getattr(stats, name) for name in names})


def _has_uri(arguments: Migrate | MigrateIncoming) -> bool:
    """Whether ``uri`` is given, and not ``channels``; an empty list counts as nothing."""
    has_uri = "uri" in arguments.model_fields_set
    if has_uri == bool(arguments.channels):
        raise QMPError("need either 'uri' or 'channels' argument")
    return has_uri


def _channels(models: list[MigrationChannelModel]) -> list[MigrationChannel]:
    types = [model.channel_type for model in models]
    for name in ("main", "cpr"):
        if types.count(name) > 1:
            raise QMPError(f"Channel list has more than one {name} entry")
    if "main" not in types:
        raise QMPError("Channel list has no main entry")
    return [channel_of(model) for model in models]


def channel_of(model: MigrationChannelModel) -> MigrationChannel:
    """The channel that a client describes.

    Raises:
        AddressError: A combination that cannot serve.
    """
    return MigrationChannel(
        model.channel_type, address_from_qapi(model.addr.model_dump(by_alias=True))
    )

"""Migration: commands, returns, types and events.

Reference: QEMU 11.1's schema; ``since`` is the release that brought a member.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from migrationd.migration.capabilities import CAPABILITIES
from migrationd.migration.parameters import PARAMETER_BY_NAME
from migrationd.qmp.models.address import MigrationAddress, SocketAddress
from migrationd.qmp.models.base import (
    EnumFeatures,
    Facts,
    QapiModel,
    Size,
    UInt8,
    UInt32,
    UInt64,
    optional,
    required,
)

MigrationStatus = Literal[
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
]

UNSTABLE = ("unstable",)

MigrationCapability = Annotated[
    Literal[CAPABILITIES],  # type: ignore[valid-type]  # one list of names
    EnumFeatures({"x-colo": UNSTABLE, "x-ignore-shared": UNSTABLE}),
]


def _string_or_null(value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise PydanticCustomError("qapi_alternate", "StrOrNull")
    return value


StrOrNull = Annotated[str | None, BeforeValidator(_string_or_null)]


class MigrationChannelModel(QapiModel):
    """A channel of a migration."""

    channel_type: Literal["main", "cpr"]
    addr: MigrationAddress


class Migrate(QapiModel):
    """Arguments of ``migrate``; either ``uri`` or ``channels``."""

    uri: str = optional()
    channels: list[MigrationChannelModel] = optional(since="8.2")
    resume: bool = Field(default=False, json_schema_extra=Facts({"since": "3.0"}))
    detach: bool = optional(deprecated=True)


class MigrateIncoming(QapiModel):
    """Arguments of ``migrate-incoming``; either ``uri`` or ``channels``."""

    uri: str = optional()
    channels: list[MigrationChannelModel] = optional(since="8.2")
    exit_on_error: bool = Field(default=True, json_schema_extra=Facts({"since": "9.1"}))


class MigrateRecover(QapiModel):
    """Arguments of ``migrate-recover``."""

    uri: str


class MigrateContinue(QapiModel):
    """Arguments of ``migrate-continue``."""

    state: MigrationStatus


class MigrationCapabilityStatus(QapiModel):
    """A capability and whether it is on."""

    capability: MigrationCapability
    state: bool


class MigrateSetCapabilities(QapiModel):
    """Arguments of ``migrate-set-capabilities``."""

    capabilities: list[MigrationCapabilityStatus]


class BitmapAliasTransform(QapiModel):
    """What changes about a bitmap on its way."""

    persistent: bool = optional()


class BitmapAliasModel(QapiModel):
    """A dirty bitmap and its name in the stream."""

    name: str
    alias: str
    transform: BitmapAliasTransform = optional(since="6.0")


class NodeAliasModel(QapiModel):
    """A block node, its name in the stream and its bitmaps."""

    node_name: str
    alias: str
    bitmaps: list[BitmapAliasModel]


def _parameter(name: str) -> Any:  # noqa: ANN401  # stands for a value of any type
    """A parameter with what its table says about it."""
    row = PARAMETER_BY_NAME[name]
    metadata: dict[str, object] = {
        "unit": row.unit,
        "since": row.since,
        "initial": row.default,
    }
    if name.startswith("x-"):
        metadata["unstable"] = True
    if row.expects:
        metadata |= {"minimum": row.minimum, "maximum": row.maximum}
    return optional(**metadata)


class MigrateSetParameters(QapiModel):
    """Arguments of ``migrate-set-parameters``; absent members keep their values."""

    nullable: ClassVar[frozenset[str]] = frozenset(("tls-creds", "tls-hostname", "tls-authz"))

    announce_initial: Size = _parameter("announce-initial")
    announce_max: Size = _parameter("announce-max")
    announce_rounds: Size = _parameter("announce-rounds")
    announce_step: Size = _parameter("announce-step")
    throttle_trigger_threshold: UInt8 = _parameter("throttle-trigger-threshold")
    cpu_throttle_initial: UInt8 = _parameter("cpu-throttle-initial")
    cpu_throttle_increment: UInt8 = _parameter("cpu-throttle-increment")
    cpu_throttle_tailslow: bool = _parameter("cpu-throttle-tailslow")
    tls_creds: StrOrNull = _parameter("tls-creds")
    tls_hostname: StrOrNull = _parameter("tls-hostname")
    tls_authz: StrOrNull = _parameter("tls-authz")
    max_bandwidth: Size = _parameter("max-bandwidth")
    avail_switchover_bandwidth: Size = _parameter("avail-switchover-bandwidth")
    downtime_limit: UInt64 = _parameter("downtime-limit")
    x_checkpoint_delay: UInt32 = _parameter("x-checkpoint-delay")
    multifd_channels: UInt8 = _parameter("multifd-channels")
    xbzrle_cache_size: Size = _parameter("xbzrle-cache-size")
    max_postcopy_bandwidth: Size = _parameter("max-postcopy-bandwidth")
    max_cpu_throttle: UInt8 = _parameter("max-cpu-throttle")
    multifd_compression: Literal["none", "zlib", "zstd"] = _parameter("multifd-compression")
    multifd_zlib_level: UInt8 = _parameter("multifd-zlib-level")
    multifd_qatzip_level: UInt8 = _parameter("multifd-qatzip-level")
    multifd_zstd_level: UInt8 = _parameter("multifd-zstd-level")
    block_bitmap_mapping: list[NodeAliasModel] = _parameter("block-bitmap-mapping")
    x_vcpu_dirty_limit_period: UInt64 = _parameter("x-vcpu-dirty-limit-period")
    vcpu_dirty_limit: UInt64 = _parameter("vcpu-dirty-limit")
    mode: Literal["normal", "cpr-reboot", "cpr-transfer", "cpr-exec"] = _parameter("mode")
    zero_page_detection: Literal["none", "legacy", "multifd"] = _parameter("zero-page-detection")
    direct_io: bool = _parameter("direct-io")
    x_rdma_chunk_size: Size = _parameter("x-rdma-chunk-size")
    cpr_exec_command: list[str] = _parameter("cpr-exec-command")


class MigrationParameters(MigrateSetParameters):
    """Return of ``query-migrate-parameters``: all of them but what was never set."""


class MigrationStats(QapiModel):
    """RAM counters of ``query-migrate``."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    postcopy_requests: int
    page_size: int
    multifd_bytes: int
    pages_per_second: int
    precopy_bytes: int
    downtime_bytes: int
    postcopy_bytes: int
    dirty_sync_missed_zero_copy: int


class VfioStats(QapiModel):
    """Counter of VFIO devices in ``query-migrate``."""

    transferred: int = required(unit="bytes")


class XBZRLECacheStats(QapiModel):
    """Counters of XBZRLE in ``query-migrate``."""

    cache_size: Size = required(unit="bytes")
    bytes: int
    pages: int
    cache_miss: int
    cache_miss_rate: float = required(since="2.1")
    encoding_rate: float = required(since="5.1")
    overflow: int


class MigrationInfoModel(QapiModel):
    """Return of ``query-migrate``; absent members are not sent."""

    status: MigrationStatus = optional()
    ram: MigrationStats = optional()
    remaining: int = optional(unit="bytes", since="11.0")
    vfio: VfioStats = optional(since="5.2")
    xbzrle_cache: XBZRLECacheStats = optional(since="1.2")
    total_time: int = optional(unit="ms", since="1.2")
    expected_downtime: int = optional(unit="ms", since="1.3")
    downtime: int = optional(unit="ms", since="1.3")
    setup_time: int = optional(unit="ms", since="1.6")
    cpu_throttle_percentage: int = optional(unit="%", since="2.7")
    error_desc: str = optional(since="2.7")
    blocked_reasons: list[str] = optional(since="6.0")
    postcopy_blocktime: UInt32 = optional(unit="ms", since="3.0")
    postcopy_vcpu_blocktime: list[UInt32] = optional(unit="ms", since="3.0")
    postcopy_latency: UInt64 = optional(unit="ns", since="10.1", unstable=True)
    postcopy_latency_dist: list[UInt64] = optional(since="10.1", unstable=True)
    postcopy_vcpu_latency: list[UInt64] = optional(unit="ns", since="10.1", unstable=True)
    postcopy_non_vcpu_latency: UInt64 = optional(unit="ns", since="10.1", unstable=True)
    socket_address: list[SocketAddress] = optional(since="4.0")
    dirty_limit_throttle_time_per_round: UInt64 = optional(unit="us", since="8.1")
    dirty_limit_ring_full_time: UInt64 = optional(unit="us", since="8.1")


class MigrationEvent(QapiModel):
    """Data of the MIGRATION event."""

    status: MigrationStatus


class MigrationPassEvent(QapiModel):
    """Data of the MIGRATION_PASS event."""

    pass_: int

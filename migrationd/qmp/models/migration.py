"""Migration: commands, returns, types and events.

Reference: QEMU 11.1's schema; ``since`` is the release that brought a member.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from migrationd.migration.options import CAPABILITIES
from migrationd.qmp.models.base import QapiModel, Size, UInt8, UInt32, UInt64

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

MigrationCapability = Literal[CAPABILITIES]  # type: ignore[valid-type]  # one list of names


def _string_or_null(value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise PydanticCustomError("qapi_alternate", "StrOrNull")
    return value


StrOrNull = Annotated[str | None, BeforeValidator(_string_or_null)]


class InetSocketAddress(QapiModel):
    """TCP address."""

    transport: Literal["socket"]
    type: Literal["inet"]
    host: str
    port: str
    numeric: bool = False
    to: UInt32 = 0
    ipv4: bool = False
    ipv6: bool = False
    keep_alive: bool = False
    keep_alive_count: UInt32 = 0
    keep_alive_idle: UInt32 = 0
    keep_alive_interval: UInt32 = 0
    mptcp: bool = False


class UnixSocketAddress(QapiModel):
    """Unix socket address."""

    transport: Literal["socket"]
    type: Literal["unix"]
    path: str
    abstract: bool = False
    tight: bool = True


class VsockSocketAddress(QapiModel):
    """Vsock address."""

    transport: Literal["socket"]
    type: Literal["vsock"]
    cid: str
    port: str


class FdSocketAddress(QapiModel):
    """Descriptor given by ``getfd``."""

    transport: Literal["socket"]
    type: Literal["fd"]
    str_: str


class ExecAddressModel(QapiModel):
    """Command, program first."""

    transport: Literal["exec"]
    args: list[str]


class RdmaAddressModel(QapiModel):
    """RDMA address."""

    transport: Literal["rdma"]
    host: str
    port: str


class FileAddressModel(QapiModel):
    """File and where the stream begins in it."""

    transport: Literal["file"]
    filename: str
    offset: Size


SocketAddress = Annotated[
    InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress,
    Field(discriminator="type"),
]


def _transport(value: object) -> str | None:
    """Which branch of the address union a value belongs to."""
    if not isinstance(value, dict):
        return None
    transport = value.get("transport")
    if transport == "socket":
        kind = value.get("type")
        return f"@{kind}" if kind in ("inet", "unix", "vsock", "fd") else "@socket"
    return f"@{transport}"


class UntypedSocketAddress(QapiModel):
    """A socket address whose ``type`` is missing or unknown: always refused."""

    transport: Literal["socket"]
    type: Literal["inet", "unix", "vsock", "fd"]


class UnknownTransport(QapiModel):
    """An address whose ``transport`` is missing or unknown: always refused."""

    transport: Literal["socket", "exec", "rdma", "file"]


def _branch(value: object) -> str:
    tag = _transport(value)
    known = ("@inet", "@unix", "@vsock", "@fd", "@socket", "@exec", "@rdma", "@file")
    return tag if tag in known else "@unknown"


MigrationAddress = Annotated[
    Annotated[InetSocketAddress, Tag("@inet")]
    | Annotated[UnixSocketAddress, Tag("@unix")]
    | Annotated[VsockSocketAddress, Tag("@vsock")]
    | Annotated[FdSocketAddress, Tag("@fd")]
    | Annotated[UntypedSocketAddress, Tag("@socket")]
    | Annotated[ExecAddressModel, Tag("@exec")]
    | Annotated[RdmaAddressModel, Tag("@rdma")]
    | Annotated[FileAddressModel, Tag("@file")]
    | Annotated[UnknownTransport, Tag("@unknown")],
    Discriminator(_branch),
]


class MigrationChannelModel(QapiModel):
    """A channel of a migration."""

    channel_type: Literal["main", "cpr"]
    addr: MigrationAddress


class Migrate(QapiModel):
    """Arguments of ``migrate``."""

    uri: str = ""
    channels: list[MigrationChannelModel] = Field(default=[], json_schema_extra={"since": "8.2"})
    detach: bool = Field(default=False, deprecated=True)
    resume: bool = False


class MigrateIncoming(QapiModel):
    """Arguments of ``migrate-incoming``."""

    uri: str = ""
    channels: list[MigrationChannelModel] = Field(default=[], json_schema_extra={"since": "8.2"})
    exit_on_error: bool = Field(default=True, json_schema_extra={"since": "9.1"})


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


class MigrateSetParameters(QapiModel):
    """Arguments of ``migrate-set-parameters``; absent members keep their values."""

    nullable: ClassVar[frozenset[str]] = frozenset(("tls-creds", "tls-hostname", "tls-authz"))

    announce_initial: Size = 0
    announce_max: Size = 0
    announce_rounds: Size = 0
    announce_step: Size = 0
    throttle_trigger_threshold: UInt8 = 0
    cpu_throttle_initial: UInt8 = 0
    cpu_throttle_increment: UInt8 = 0
    cpu_throttle_tailslow: bool = False
    tls_creds: StrOrNull = None
    tls_hostname: StrOrNull = None
    tls_authz: StrOrNull = None
    max_bandwidth: Size = 0
    avail_switchover_bandwidth: Size = 0
    downtime_limit: UInt64 = 0
    x_checkpoint_delay: UInt32 = 0
    multifd_channels: UInt8 = 0
    xbzrle_cache_size: Size = 0
    max_postcopy_bandwidth: Size = 0
    max_cpu_throttle: UInt8 = 0
    multifd_compression: Literal["none", "zlib", "zstd"] = "none"
    multifd_zlib_level: UInt8 = 0
    multifd_qatzip_level: UInt8 = 0
    multifd_zstd_level: UInt8 = 0
    x_vcpu_dirty_limit_period: UInt64 = 0
    vcpu_dirty_limit: UInt64 = 0
    mode: Literal["normal", "cpr-reboot", "cpr-transfer", "cpr-exec"] = "normal"
    zero_page_detection: Literal["none", "legacy", "multifd"] = "multifd"
    direct_io: bool = False
    x_rdma_chunk_size: Size = 0
    cpr_exec_command: list[str] = Field(default=[])


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


class MigrationInfoModel(QapiModel):
    """Return of ``query-migrate``; absent members are not sent."""

    status: MigrationStatus | None = None
    ram: MigrationStats | None = None
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    remaining: int | None = Field(default=None, json_schema_extra={"since": "11.0"})
    error_desc: str | None = None
    blocked_reasons: list[str] | None = None
    socket_address: list[dict[str, object]] | None = None


class MigrationEvent(QapiModel):
    """Data of the MIGRATION event."""

    status: MigrationStatus


class MigrationPassEvent(QapiModel):
    """Data of the MIGRATION_PASS event."""

    pass_: int

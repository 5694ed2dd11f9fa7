"""What the machine has: for a guest that does not execute, mostly nothing.

Returns that can only be empty lists name the members that every release has.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from migrationd.qmp.models.base import QapiModel, QapiUnion, Size, UInt64, optional

WatchdogAction = Literal["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"]

SysEmuTarget = Literal[
    "aarch64", "alpha", "arm", "avr", "hexagon", "hppa", "i386", "loongarch64", "m68k",
    "microblaze", "mips", "mips64", "mips64el", "mipsel", "or1k", "ppc", "ppc64", "riscv32",
    "riscv64", "rx", "s390x", "sh4", "sh4eb", "sparc", "sparc64", "tricore", "x86_64", "xtensa",
    "xtensaeb",
]  # fmt: skip


class TargetInfo(QapiModel):
    """Return of ``query-target``."""

    arch: SysEmuTarget


class CompatProperty(QapiModel):
    """A property that a machine type sets."""

    qom_type: str
    property: str
    value: str


class QueryMachines(QapiModel):
    """Arguments of ``query-machines``."""

    compat_props: bool = optional(since="9.1", unstable=True)


class MachineInfo(QapiModel):
    """One entry of ``query-machines``."""

    name: str
    alias: str = optional()
    is_default: bool = optional()
    cpu_max: int
    hotpluggable_cpus: bool
    numa_mem_supported: bool
    deprecated: bool
    default_cpu_type: str = optional()
    default_ram_id: str = optional()
    acpi: bool
    compat_props: list[CompatProperty] = optional(since="9.1", unstable=True)


class CurrentMachineParams(QapiModel):
    """Return of ``query-current-machine``."""

    wakeup_suspend_support: bool


class CpuInstanceProperties(QapiModel):
    """Where in the machine a CPU sits."""

    node_id: int = optional()
    drawer_id: int = optional()
    book_id: int = optional()
    socket_id: int = optional()
    die_id: int = optional()
    cluster_id: int = optional()
    module_id: int = optional()
    core_id: int = optional()
    thread_id: int = optional()


class CpuInfoFast(QapiModel):
    """One entry of ``query-cpus-fast``."""

    cpu_index: int
    qom_type: str
    qom_path: str
    thread_id: int
    props: CpuInstanceProperties = optional()
    target: SysEmuTarget


class HotpluggableCpu(QapiModel):
    """One entry of ``query-hotpluggable-cpus``."""

    type: str
    vcpus_count: int
    props: CpuInstanceProperties
    qom_path: str = optional()


class CpuDefinition(QapiModel):
    """One entry of ``query-cpu-definitions``."""

    name: str
    migration_safe: bool = optional()
    static: bool
    unavailable_features: list[str] = optional()
    typename: str
    alias_of: str = optional()
    deprecated: bool


class Memdev(QapiModel):
    """One entry of ``query-memdev``."""

    id: str = optional()
    size: Size
    merge: bool
    dump: bool
    prealloc: bool
    share: bool
    reserve: bool = optional()
    host_nodes: list[UInt64]
    policy: Literal["default", "preferred", "bind", "interleave"]


class MemorySizes(QapiModel):
    """Return of ``query-memory-size-summary``."""

    base_memory: Size
    plugged_memory: Size = optional()


class MemoryDevice(QapiModel):
    """One entry of ``query-memory-devices``; there is never one."""

    type: Literal["dimm", "nvdimm", "virtio-pmem", "virtio-mem", "sgx-epc", "hv-balloon", "sp-mem"]


class IOThreadInfo(QapiModel):
    """One entry of ``query-iothreads``."""

    id: str
    thread_id: int
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    poll_weight: int
    aio_max_batch: int


class AcpiOstInfo(QapiModel):
    """One entry of ``query-acpi-ospm-status``."""

    device: str = optional()
    slot: str
    slot_type: Literal["DIMM", "CPU"]
    source: int
    status: int


class BalloonInfo(QapiModel):
    """Return of ``query-balloon``."""

    actual: int


class BalloonValue(QapiModel):
    """Arguments of ``balloon``."""

    value: int


class BlockInfo(QapiModel):
    """One entry of ``query-block``; there is never one."""

    device: str
    qdev: str = optional()
    type: str
    removable: bool
    locked: bool


class BlockStats(QapiModel):
    """One entry of ``query-blockstats``; there is never one."""

    device: str = optional()
    qdev: str = optional()
    node_name: str = optional()


class BlockNode(QapiModel):
    """One entry of ``query-named-block-nodes``."""

    file: str
    node_name: str
    ro: bool
    drv: str


class QueryBlock(QapiModel):
    """Arguments of ``query-block`` and ``query-named-block-nodes``."""

    flat: bool = optional(since="5.0")


class QueryBlockStats(QapiModel):
    """Arguments of ``query-blockstats``."""

    query_nodes: bool = optional()


class BlockJobInfo(QapiModel):
    """One entry of ``query-block-jobs``; there is never one."""

    type: str
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    ready: bool


class BlockExportInfo(QapiModel):
    """One entry of ``query-block-exports``; there is never one."""

    id: str
    type: Literal["nbd", "vhost-user-blk", "fuse", "vduse-blk"]
    node_name: str
    shutting_down: bool


class ChardevInfo(QapiModel):
    """One entry of ``query-chardev``."""

    label: str
    filename: str
    frontend_open: bool


class MouseInfo(QapiModel):
    """One entry of ``query-mice``; there is never one."""

    name: str
    index: int
    current: bool
    absolute: bool


class QueryRxFilter(QapiModel):
    """Arguments of ``query-rx-filter``."""

    name: str = optional()


class RxFilterInfo(QapiModel):
    """One entry of ``query-rx-filter``; there is never one."""

    name: str
    promiscuous: bool


TpmModel = Literal["tpm-tis", "tpm-crb", "tpm-spapr"]
TpmType = Literal["passthrough", "emulator"]


class TpmInfo(QapiModel):
    """One entry of ``query-tpm``; there is never one."""

    id: str
    model: TpmModel


class VncInfo(QapiModel):
    """Return of ``query-vnc``."""

    enabled: bool


class SpiceInfo(QapiModel):
    """Return of ``query-spice``."""

    enabled: bool
    migrated: bool
    mouse_mode: Literal["client", "server", "unknown"]


class ReplayInfo(QapiModel):
    """Return of ``query-replay``."""

    mode: Literal["none", "record", "play"]
    filename: str = optional()
    icount: int


class DumpQueryResult(QapiModel):
    """Return of ``query-dump``."""

    status: Literal["none", "active", "completed", "failed"]
    completed: int
    total: int


SevState = Literal[
    "uninit", "launch-update", "launch-secret", "running", "send-update", "receive-update"
]
SevGuestType = Literal["sev", "sev-snp"]


class SevBase(QapiModel):
    """What ``query-sev`` says of each kind of guest."""

    enabled: bool
    api_major: int
    api_minor: int
    build_id: int
    state: SevState
    sev_type: SevGuestType


class SevMembers(QapiModel):
    """Of SEV itself."""

    policy: int
    handle: int


class SevSnpMembers(QapiModel):
    """Of SEV-SNP."""

    snp_policy: int


class SevGuest(SevBase, SevMembers):
    """Return of ``query-sev``."""

    sev_type: Literal["sev"]


class SevSnpGuest(SevBase, SevSnpMembers):
    """Return of ``query-sev`` for SEV-SNP."""

    sev_type: Literal["sev-snp"]


SevInfo = Annotated[
    SevGuest | SevSnpGuest,
    Field(discriminator="sev_type"),
    QapiUnion(SevBase, "sev-type", {"sev": SevMembers, "sev-snp": SevSnpMembers}),
]


class GicCapability(QapiModel):
    """One entry of ``query-gic-capabilities``."""

    version: int
    emulated: bool
    kernel: bool


DumpGuestMemoryFormat = Literal[
    "elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "kdump-raw-zlib", "kdump-raw-lzo",
    "kdump-raw-snappy", "win-dmp",
]  # fmt: skip


class DumpGuestMemoryCapability(QapiModel):
    """Return of ``query-dump-guest-memory-capability``."""

    formats: list[DumpGuestMemoryFormat]


class CpuModel(QapiModel):
    """A CPU model with properties."""

    name: str
    props: Any = optional()


class CpuModelExpansion(QapiModel):
    """Arguments of ``query-cpu-model-expansion``."""

    type: Literal["static", "full"]
    model: CpuModel


class CpuModelExpansionInfo(QapiModel):
    """Return of ``query-cpu-model-expansion``."""

    model: CpuModel
    deprecated_props: list[str] = optional(since="9.1")


class SetAction(QapiModel):
    """Arguments of ``set-action``."""

    reboot: Literal["reset", "shutdown"] = optional()
    shutdown: Literal["poweroff", "pause"] = optional()
    panic: Literal["pause", "shutdown", "exit-failure", "none"] = optional()
    watchdog: WatchdogAction = optional()


class WatchdogSetAction(QapiModel):
    """Arguments of ``watchdog-set-action``."""

    action: WatchdogAction


class DeviceAdd(QapiModel):
    """Arguments of ``device_add``; the properties of the device stand beside them."""

    model_config = ConfigDict(extra="allow")

    driver: str
    bus: str = optional()
    id: str = optional()


class DeviceDel(QapiModel):
    """Arguments of ``device_del``."""

    id: str


class SetLink(QapiModel):
    """Arguments of ``set_link``."""

    name: str
    up: bool


class AnnounceSelf(QapiModel):
    """Arguments of ``announce-self``."""

    initial: int
    max: int
    rounds: int
    step: int
    interfaces: list[str] = optional(since="4.1")
    id: str = optional(since="4.1")


class ClientMigrateInfo(QapiModel):
    """Arguments of ``client_migrate_info``."""

    protocol: str
    hostname: str
    port: int = optional()
    tls_port: int = optional()
    cert_subject: str = optional()


class CpuInfo(QapiModel):
    """One entry of ``query-cpus``; there is never one."""

    CPU: int
    current: bool
    halted: bool
    qom_path: str
    thread_id: int


class EventInfo(QapiModel):
    """One entry of ``query-events``."""

    name: str

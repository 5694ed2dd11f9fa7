"""The type ``migration`` as tools see it: its properties are capabilities, parameters, globals.

Reference: ``qom-list-properties`` and ``device-list-properties`` of QEMU 11.1.
"""

from migrationd.migration.parameters import PARAMETER_BY_NAME
from migrationd.qmp.models.objects import ObjectPropertyInfo

TYPE_NAME = "migration"

_EVERY_DEVICE = (
    ("type", "string"),
    ("parent_bus", "link<bus>"),
    ("realized", "bool"),
    ("hotplugged", "bool"),
    ("hotpluggable", "bool"),
)

_CAPABILITIES = (
    "x-release-ram", "x-colo", "x-return-path", "x-postcopy-preempt", "x-postcopy-ram",
    "x-auto-converge", "mapped-ram", "x-multifd", "x-zero-copy-send", "postcopy-blocktime",
    "x-events", "x-xbzrle", "x-rdma-pin-all", "x-background-snapshot", "x-dirty-limit",
    "x-switchover-ack", "x-ignore-shared",
)  # fmt: skip

_GLOBALS = {
    "send-switchover-start": True,
    "send-configuration": True,
    "send-section-footer": True,
    "multifd-flush-after-each-section": False,
    "x-preempt-pre-7-2": False,
    "multifd-clean-tls-termination": True,
    "store-global-state": True,
    "switchover-ack-legacy": False,
}

_PARAMETERS = {
    "x-rdma-chunk-size": "uint64",
    "avail-switchover-bandwidth": "size",
    "announce-step": "size",
    "x-max-bandwidth": "size",
    "multifd-channels": "uint8",
    "announce-rounds": "size",
    "tls-hostname": "StrOrNull",
    "tls-creds": "StrOrNull",
    "multifd-compression": "MultiFDCompression",
    "vcpu-dirty-limit": "uint64",
    "x-cpu-throttle-initial": "uint8",
    "multifd-zlib-level": "uint8",
    "x-vcpu-dirty-limit-period": "uint64",
    "multifd-zstd-level": "uint8",
    "tls-authz": "StrOrNull",
    "multifd-qatzip-level": "uint8",
    "x-checkpoint-delay": "uint32",
    "x-cpu-throttle-increment": "uint8",
    "x-throttle-trigger-threshold": "uint8",
    "announce-initial": "size",
    "mode": "MigMode",
    "x-cpu-throttle-tailslow": "bool",
    "x-downtime-limit": "uint64",
    "max-postcopy-bandwidth": "size",
    "announce-max": "size",
    "xbzrle-cache-size": "size",
    "zero-page-detection": "ZeroPageDetection",
    "max-cpu-throttle": "uint8",
}
"""Property to its type; the name of the parameter is the same, or what follows ``x-``."""

_DESCRIPTIONS = {
    "multifd-compression": "multifd compression method (none/zlib/zstd/qpl/uadk/qatzip)",
    "mode": "Migration mode (normal/cpr-reboot)",
    "zero-page-detection": "Zero page detection (none/legacy/multifd)",
}


def device_properties() -> list[ObjectPropertyInfo]:
    """What ``device-list-properties`` returns."""
    flags = dict.fromkeys(_CAPABILITIES, False) | _GLOBALS
    found = [_property(name, "bool", default) for name, default in flags.items()]
    found.append(_property("x-clear-bitmap-shift", "uint8", 18))
    for name, kind in _PARAMETERS.items():
        parameter = PARAMETER_BY_NAME.get(name) or PARAMETER_BY_NAME[name.removeprefix("x-")]
        found.append(_property(name, kind, parameter.default))
    return found


def all_properties() -> list[ObjectPropertyInfo]:
    """What ``qom-list-properties`` returns."""
    inherited = [ObjectPropertyInfo.make(name=name, type=kind) for name, kind in _EVERY_DEVICE]
    return inherited + device_properties()


def _property(name: str, kind: str, default: object) -> ObjectPropertyInfo:
    return ObjectPropertyInfo.make(
        name=name,
        type=kind,
        description="on/off" if kind == "bool" else _DESCRIPTIONS.get(name),
        default_value=default,
    )

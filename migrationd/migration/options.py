"""Capabilities and parameters: names, defaults, ranges, conflicts.

A change is checked as a whole on a copy and committed all or nothing.

Reference: QEMU 11.1's enumeration order, defaults, ranges, check order and texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from migrationd.errors import QMPError

Value = int | bool | str | list[str]

UINT64_MAX = (1 << 64) - 1

CAPABILITIES: tuple[str, ...] = (
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
)

NOT_BUILT: frozenset[str] = frozenset(
    (
        "rdma-pin-all",
        "postcopy-ram",
        "x-colo",
        "release-ram",
        "multifd",
        "dirty-bitmaps",
        "postcopy-blocktime",
        "x-ignore-shared",
        "background-snapshot",
        "zero-copy-send",
        "postcopy-preempt",
        "dirty-limit",
        "mapped-ram",
    )
)
"""Capabilities whose engine part is not there: they cannot be turned on."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One migration parameter.

    Attributes:
        name: QMP name.
        default: Initial value; its type is the parameter's.
        minimum: Smallest value of a number.
        maximum: Largest value of a number.
        expects: QEMU's words for the range.
        choices: Values of an enumeration.
        unit: Of a number.
    """

    name: str
    default: Value
    minimum: int = 0
    maximum: int = UINT64_MAX
    expects: str = ""
    choices: tuple[str, ...] = ()
    unit: str = ""


def _range(low: int, high: int) -> str:
    return f"a value between {low} and {high}"


def _percent(low: int, high: int) -> str:
    return f"an integer in the range of {low} to {high}"


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("announce-initial", 50, 0, 100000, _range(0, 100000), unit="ms"),
    Parameter("announce-max", 550, 0, 100000, _range(0, 100000), unit="ms"),
    Parameter("announce-rounds", 5, 0, 1000, _range(0, 1000)),
    Parameter("announce-step", 100, 1, 10000, _range(0, 10000), unit="ms"),
    Parameter("throttle-trigger-threshold", 50, 1, 100, _percent(1, 100), unit="%"),
    Parameter("cpu-throttle-initial", 20, 1, 99, _percent(1, 99), unit="%"),
    Parameter("cpu-throttle-increment", 10, 1, 99, _percent(1, 99), unit="%"),
    Parameter("cpu-throttle-tailslow", False),
    Parameter(
        "max-cpu-throttle", 99, 1, 99, "an integer in the range of cpu-throttle-initial to 99",
        unit="%",
    ),
    Parameter("tls-creds", ""),
    Parameter("tls-hostname", ""),
    Parameter("tls-authz", ""),
    Parameter("max-bandwidth", 134217728, unit="bytes/second"),
    Parameter("avail-switchover-bandwidth", 0, unit="bytes/second"),
    Parameter(
        "downtime-limit", 300, 0, 2000000, "an integer in the range of 0 to (2000 * 1000) ms",
        unit="ms",
    ),
    Parameter("x-checkpoint-delay", 20000, 0, 0xFFFFFFFF, unit="ms"),
    Parameter("multifd-channels", 2, 1, 255, _range(1, 255)),
    Parameter(
        "xbzrle-cache-size", 67108864, 4096, UINT64_MAX,
        "a power of two no less than the target page size", unit="bytes",
    ),
    Parameter("max-postcopy-bandwidth", 0, unit="bytes/second"),
    Parameter("multifd-compression", "none", choices=("none", "zlib", "zstd")),
    Parameter("multifd-zlib-level", 1, 0, 9, _range(0, 9)),
    Parameter("multifd-qatzip-level", 1, 1, 9, _range(1, 9)),
    Parameter("multifd-zstd-level", 1, 0, 20, _range(0, 20)),
    Parameter("x-vcpu-dirty-limit-period", 1000, 1, 1000, _range(1, 1000), unit="ms"),
    Parameter("vcpu-dirty-limit", 1, 1, UINT64_MAX, unit="MB/s"),
    Parameter("mode", "normal", choices=("normal", "cpr-reboot", "cpr-transfer", "cpr-exec")),
    Parameter("zero-page-detection", "multifd", choices=("none", "legacy", "multifd")),
    Parameter("direct-io", False),
    Parameter("x-rdma-chunk-size", 1048576, unit="bytes"),
    Parameter("cpr-exec-command", []),
)  # fmt: skip

PARAMETER_BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}

_CHECK_ORDER: tuple[str, ...] = (
    "throttle-trigger-threshold",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "downtime-limit",
    "multifd-channels",
    "multifd-zlib-level",
    "multifd-qatzip-level",
    "multifd-zstd-level",
    "xbzrle-cache-size",
    "max-cpu-throttle",
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "x-vcpu-dirty-limit-period",
    "vcpu-dirty-limit",
)

_NOT_BUILT_VALUES: tuple[tuple[str, Value], ...] = (
    ("tls-creds", ""),
    ("mode", "normal"),
    ("direct-io", False),
)
"""Parameters that may only keep this value until their engine part is there."""


class MigrationOptions:
    """The settings of one process; both directions read them."""

    def __init__(self) -> None:
        self._capabilities = dict.fromkeys(CAPABILITIES, False)
        self._parameters: dict[str, Value] = {item.name: item.default for item in PARAMETERS}

    @property
    def capabilities(self) -> Mapping[str, bool]:
        """Capabilities in enumeration order."""
        return self._capabilities

    @property
    def parameters(self) -> Mapping[str, Value]:
        """Parameters by QMP name."""
        return self._parameters

    def set_capabilities(self, changes: Sequence[tuple[str, bool]]) -> None:
        """Apply changes in order; the whole result is checked, then committed.

        Raises:
            QMPError: With QEMU's text; nothing changes.
        """
        new = self._capabilities | dict(changes)
        self._check_capabilities(new)
        self._capabilities = new

    def set_parameters(self, changes: Mapping[str, Value]) -> None:
        """Apply changes; all values are checked, then committed.

        Raises:
            QMPError: With QEMU's text; nothing changes.
        """
        new = self._parameters | dict(changes)
        for name in _CHECK_ORDER:
            check_parameter(new, name)
        for name, only in _NOT_BUILT_VALUES:
            if new[name] != only:
                raise QMPError(f"Parameter '{name}' is not supported in this version of migrationd")
        self._parameters = new

    def _check_capabilities(self, new: Mapping[str, bool]) -> None:
        if new["switchover-ack"] and not new["return-path"]:
            raise QMPError("Capability 'switchover-ack' requires capability 'return-path'")
        if new["postcopy-preempt"] and not new["postcopy-ram"]:
            raise QMPError("Postcopy preempt requires postcopy-ram")
        for name in CAPABILITIES:
            if new[name] and name in NOT_BUILT:
                raise QMPError(
                    f"Capability '{name}' is not supported in this version of migrationd"
                )


def check_parameter(values: Mapping[str, Value], name: str) -> None:
    """Check one number against its range.

    Raises:
        QMPError: With QEMU's text.
    """
    parameter = PARAMETER_BY_NAME[name]
    value = values[name]
    if not isinstance(value, int):
        return
    low = parameter.minimum
    if name == "max-cpu-throttle":
        initial = values["cpu-throttle-initial"]
        low = initial if isinstance(initial, int) else low
    wrong = not low <= value <= parameter.maximum
    if name == "xbzrle-cache-size":
        wrong = wrong or value.bit_count() != 1
    if not wrong:
        return
    if name == "vcpu-dirty-limit":
        raise QMPError("Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s")
    raise QMPError(f"Option {name} expects {parameter.expects}")

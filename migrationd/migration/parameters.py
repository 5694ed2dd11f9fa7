"""Migration parameters: names, types, defaults, ranges and units.

Reference: QEMU 11.1's defaults, ranges, order of checks and texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from migrationd.errors import QMPError
from migrationd.migration.bitmap_mapping import BitmapMapping, check_mapping

Value = int | bool | str | list[str] | BitmapMapping | None

UINT64_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One migration parameter.

    Attributes:
        name: QMP name.
        default: Initial value; its type is the parameter's. None: absent until set.
        minimum: Smallest value of a number.
        maximum: Largest value of a number.
        expects: QEMU's words for the range.
        choices: Values of an enumeration.
        unit: Of a number.
        since: QEMU release that brought it.
    """

    name: str
    default: Value
    minimum: int = 0
    maximum: int = UINT64_MAX
    expects: str = ""
    choices: tuple[str, ...] = ()
    unit: str = ""
    since: str = ""


def _between(low: int, high: int) -> str:
    return f"a value between {low} and {high}"


def _in_range(low: int | str, high: int | str) -> str:
    return f"an integer in the range of {low} to {high}"


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("announce-initial", 50, 0, 100000, _between(0, 100000), unit="ms", since="4.0"),
    Parameter("announce-max", 550, 0, 100000, _between(0, 100000), unit="ms", since="4.0"),
    Parameter("announce-rounds", 5, 0, 1000, _between(0, 1000), since="4.0"),
    Parameter("announce-step", 100, 1, 10000, _between(0, 10000), unit="ms", since="4.0"),
    Parameter("throttle-trigger-threshold", 50, 1, 100, _in_range(1, 100), unit="%", since="5.0"),
    Parameter("cpu-throttle-initial", 20, 1, 99, _in_range(1, 99), unit="%", since="2.7"),
    Parameter("cpu-throttle-increment", 10, 1, 99, _in_range(1, 99), unit="%", since="2.7"),
    Parameter("cpu-throttle-tailslow", False, since="5.1"),
    Parameter("tls-creds", "", since="2.7"),
    Parameter("tls-hostname", "", since="2.7"),
    Parameter("tls-authz", "", since="4.0"),
    Parameter("max-bandwidth", 134217728, unit="bytes/second", since="2.8"),
    Parameter("avail-switchover-bandwidth", 0, unit="bytes/second", since="8.2"),
    Parameter(
        "downtime-limit", 300, 0, 2000000, _in_range(0, "(2000 * 1000) ms"), unit="ms", since="2.8"
    ),
    Parameter("x-checkpoint-delay", 20000, 0, 0xFFFFFFFF, unit="ms", since="2.8"),
    Parameter("multifd-channels", 2, 1, 255, _between(1, 255), since="4.0"),
    Parameter(
        "xbzrle-cache-size", 67108864, 4096, UINT64_MAX,
        "a power of two no less than the target page size", unit="bytes", since="2.11",
    ),
    Parameter("max-postcopy-bandwidth", 0, unit="bytes/second", since="3.0"),
    Parameter(
        "max-cpu-throttle", 99, 1, 99, _in_range("cpu-throttle-initial", 99), unit="%", since="3.1"
    ),
    Parameter("multifd-compression", "none", choices=("none", "zlib", "zstd"), since="5.0"),
    Parameter("multifd-zlib-level", 1, 0, 9, _between(0, 9), since="5.0"),
    Parameter("multifd-qatzip-level", 1, 1, 9, _between(1, 9), since="9.2"),
    Parameter("multifd-zstd-level", 1, 0, 20, _between(0, 20), since="5.0"),
    Parameter("block-bitmap-mapping", None, since="5.2"),
    Parameter("x-vcpu-dirty-limit-period", 1000, 1, 1000, _between(1, 1000), unit="ms",
              since="8.1"),
    Parameter("vcpu-dirty-limit", 1, 1, UINT64_MAX, unit="MB/s", since="8.1"),
    Parameter(
        "mode", "normal", choices=("normal", "cpr-reboot", "cpr-transfer", "cpr-exec"), since="8.2"
    ),
    Parameter("zero-page-detection", "multifd", choices=("none", "legacy", "multifd"),
              since="9.0"),
    Parameter("direct-io", False, since="9.1"),
    Parameter("x-rdma-chunk-size", 1048576, unit="bytes", since="11.1"),
    Parameter("cpr-exec-command", [], since="10.2"),
)  # fmt: skip

PARAMETER_BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}

CHECKED_FIRST: tuple[str, ...] = (
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
    "block-bitmap-mapping",
)
"""What QEMU checks before the conflicts with capabilities, in its order."""

CHECKED_LAST: tuple[str, ...] = ("x-vcpu-dirty-limit-period", "vcpu-dirty-limit")


def check_parameter(values: Mapping[str, Value], name: str) -> None:
    """Check one parameter against its range.

    Args:
        values: Every parameter; a limit may depend on another one.
        name: Which one.

    Raises:
        QMPError: With QEMU's text.
    """
    parameter = PARAMETER_BY_NAME[name]
    value = values[name]
    if isinstance(value, tuple):
        check_mapping(value)
    if not isinstance(value, int):
        return
    low = parameter.minimum
    if name == "max-cpu-throttle":
        initial = values["cpu-throttle-initial"]
        low = initial if isinstance(initial, int) else low
    is_wrong = not low <= value <= parameter.maximum
    if name == "xbzrle-cache-size":
        is_wrong = is_wrong or value.bit_count() != 1
    if not is_wrong:
        return
    if name == "vcpu-dirty-limit":
        raise QMPError("Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s")
    raise QMPError(f"Option {name} expects {parameter.expects}")

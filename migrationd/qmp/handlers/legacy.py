"""Commands of old releases that tools still send, on top of the parameters.

Reference: QEMU 2.5 to 5.2.
"""

import math

from migrationd.errors import QMPError
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.handlers.machine import nothing_of_the_kind
from migrationd.qmp.models.events import EVENTS
from migrationd.qmp.models.legacy import CacheSize, Downtime, Speed
from migrationd.qmp.models.machine import CpuInfo, EventInfo

_DEPRECATED = ("deprecated",)
_SPEED_LIMIT = (1 << 63) - 1
_DOWNTIME_LIMIT_S = 2000.0
_PAGE_BYTES = 4096


def set_speed(call: Invocation, arguments: Speed) -> None:
    """``migrate_set_speed``: bytes per second, clamped."""
    speed = min(max(arguments.value, 0), _SPEED_LIMIT)
    call.control.options.set_parameters({"max-bandwidth": speed})
    call.control.outgoing.parameters_changed()


def set_downtime(call: Invocation, arguments: Downtime) -> None:
    """``migrate_set_downtime``: seconds, clamped."""
    seconds = min(max(arguments.value, 0.0), _DOWNTIME_LIMIT_S)
    call.control.options.set_parameters({"downtime-limit": math.floor(seconds * 1000)})
    call.control.outgoing.parameters_changed()


def set_cache_size(call: Invocation, arguments: CacheSize) -> None:
    """``migrate-set-cache-size``: rounded down to a power of two."""
    size = arguments.value
    ram_bytes = call.control.machine.ram_bytes
    if ram_bytes and size > ram_bytes:
        raise QMPError("Parameter 'cache size' expects exceeds guest ram size ")
    if size < _PAGE_BYTES:
        raise QMPError("Parameter 'cache size' expects is smaller than page size")
    call.control.options.set_parameters({"xbzrle-cache-size": 1 << (size.bit_length() - 1)})
    call.control.outgoing.parameters_changed()


def query_cache_size(call: Invocation, _: object) -> int:
    """``query-migrate-cache-size``."""
    size = call.control.options.parameters["xbzrle-cache-size"]
    assert isinstance(size, int)
    return size


def query_events(call: Invocation, _: object) -> list[EventInfo]:
    """``query-events``."""
    return [EventInfo.make(name=name) for name in EVENTS]


COMMANDS: tuple[CommandSpec, ...] = (
    command("migrate_set_speed", set_speed, Speed, features=_DEPRECATED),
    command("migrate_set_downtime", set_downtime, Downtime, features=_DEPRECATED),
    command("migrate-set-cache-size", set_cache_size, CacheSize, features=_DEPRECATED),
    command("query-migrate-cache-size", query_cache_size, returns=int, features=_DEPRECATED),
    command("query-events", query_events, returns=list[EventInfo], features=_DEPRECATED),
    command("query-cpus", nothing_of_the_kind, returns=list[CpuInfo], features=_DEPRECATED),
)

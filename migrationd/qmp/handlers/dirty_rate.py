"""Dirty rate and vCPU limits."""

from migrationd.errors import QMPError
from migrationd.migration.dirty_rate import check_request
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.handlers.machine import accepted, nothing_of_the_kind
from migrationd.qmp.models import dirty_rate as models


def calc_dirty_rate(call: Invocation, arguments: models.CalcDirtyRate) -> None:
    """``calc-dirty-rate``: the result comes by ``query-dirty-rate``."""
    meter = call.control.machine.dirty_rate
    if meter.state.status == "measuring":
        raise QMPError("the dirty rate is already being measured.")
    meter.start(
        check_request(
            arguments.calc_time,
            arguments.calc_time_unit,
            arguments.sample_pages if "sample_pages" in arguments.model_fields_set else None,
            arguments.mode,
        )
    )


def query_dirty_rate(call: Invocation, arguments: models.QueryDirtyRate) -> models.DirtyRateInfo:
    """``query-dirty-rate``."""
    state = call.control.machine.dirty_rate.state
    unit = arguments.calc_time_unit
    milliseconds = state.request.calc_time_ms
    return models.DirtyRateInfo.make(
        status=state.status,
        start_time=state.start_time_s,
        calc_time=milliseconds if unit == "millisecond" else milliseconds // 1000,
        calc_time_unit=unit,
        sample_pages=state.request.sample_pages,
        mode=state.request.mode,
        dirty_rate=state.rate_mib_per_s,
    )


def set_vcpu_dirty_limit(call: Invocation, arguments: models.SetVcpuDirtyLimit) -> None:
    """``set-vcpu-dirty-limit``."""
    raise QMPError(
        "dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'"
    )


COMMANDS: tuple[CommandSpec, ...] = (
    command("calc-dirty-rate", calc_dirty_rate, models.CalcDirtyRate),
    command("query-dirty-rate", query_dirty_rate, models.QueryDirtyRate, models.DirtyRateInfo),
    command("set-vcpu-dirty-limit", set_vcpu_dirty_limit, models.SetVcpuDirtyLimit),
    command("cancel-vcpu-dirty-limit", accepted, models.CancelVcpuDirtyLimit),
    command("query-vcpu-dirty-limit", nothing_of_the_kind, returns=list[models.DirtyLimitInfo]),
)

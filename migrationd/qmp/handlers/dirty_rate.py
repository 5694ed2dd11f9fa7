"""Dirty rate and vCPU limits."""

from migrationd.errors import QMPError
from migrationd.migration.dirty_rate import check_request
from migrationd.qmp.command import CommandSpec, Invocation, command
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
    """``set-vcpu-dirty-limit``: of a workload, which is one CPU."""
    index = arguments.cpu_index if "cpu_index" in arguments.model_fields_set else None
    call.control.machine.dirty_limit.set(index, arguments.dirty_rate)


def cancel_vcpu_dirty_limit(call: Invocation, _: models.CancelVcpuDirtyLimit) -> None:
    """``cancel-vcpu-dirty-limit``."""
    call.control.machine.dirty_limit.lift()


def query_vcpu_dirty_limit(call: Invocation, _: object) -> list[models.DirtyLimitInfo]:
    """``query-vcpu-dirty-limit``."""
    state = call.control.machine.dirty_limit.state
    if state is None:
        return []
    limit, current = state.limit_mib_per_s, state.current_mib_per_s
    return [models.DirtyLimitInfo.make(cpu_index=0, limit_rate=limit, current_rate=current)]


COMMANDS: tuple[CommandSpec, ...] = (
    command("calc-dirty-rate", calc_dirty_rate, models.CalcDirtyRate),
    command("query-dirty-rate", query_dirty_rate, models.QueryDirtyRate, models.DirtyRateInfo),
    command("set-vcpu-dirty-limit", set_vcpu_dirty_limit, models.SetVcpuDirtyLimit),
    command("cancel-vcpu-dirty-limit", cancel_vcpu_dirty_limit, models.CancelVcpuDirtyLimit),
    command("query-vcpu-dirty-limit", query_vcpu_dirty_limit, returns=list[models.DirtyLimitInfo]),
)

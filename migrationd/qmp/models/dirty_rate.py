"""How fast a guest dirties its memory, and limits of that."""

from typing import Literal

from pydantic import Field

from migrationd.qmp.models.base import Facts, QapiModel, UInt64, optional, required

TimeUnit = Literal["second", "millisecond"]
DirtyRateMode = Literal["page-sampling", "dirty-ring", "dirty-bitmap"]


class CalcDirtyRate(QapiModel):
    """Arguments of ``calc-dirty-rate``."""

    calc_time: int
    calc_time_unit: TimeUnit = Field(default="second", json_schema_extra=Facts({"since": "8.2"}))
    sample_pages: int = optional(since="6.1", unit="pages/GiB", initial=512)
    mode: DirtyRateMode = Field(default="page-sampling", json_schema_extra=Facts({"since": "6.2"}))


class QueryDirtyRate(QapiModel):
    """Arguments of ``query-dirty-rate``."""

    calc_time_unit: TimeUnit = Field(default="second", json_schema_extra=Facts({"since": "8.2"}))


class DirtyRateVcpu(QapiModel):
    """Rate of one vCPU."""

    id: int
    dirty_rate: int = required(unit="MiB/s")


class DirtyRateInfo(QapiModel):
    """Return of ``query-dirty-rate``."""

    dirty_rate: int = optional(unit="MiB/s")
    status: Literal["unstarted", "measuring", "measured"]
    start_time: int = required(unit="s")
    calc_time: int
    calc_time_unit: TimeUnit
    sample_pages: int
    mode: DirtyRateMode
    vcpu_dirty_rate: list[DirtyRateVcpu] = optional(since="6.2")


class SetVcpuDirtyLimit(QapiModel):
    """Arguments of ``set-vcpu-dirty-limit``."""

    cpu_index: int = optional()
    dirty_rate: UInt64 = required(unit="MB/s")


class CancelVcpuDirtyLimit(QapiModel):
    """Arguments of ``cancel-vcpu-dirty-limit``."""

    cpu_index: int = optional()


class DirtyLimitInfo(QapiModel):
    """One entry of ``query-vcpu-dirty-limit``."""

    cpu_index: int
    limit_rate: UInt64
    current_rate: UInt64

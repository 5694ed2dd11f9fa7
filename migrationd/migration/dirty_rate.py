"""What can be asked of a dirty-rate measurement, and what it says. Pure.

Reference: ranges, order of checks and texts of QEMU 11.1's ``calc-dirty-rate``.
"""

from dataclasses import dataclass

from migrationd.errors import QMPError

DEFAULT_SAMPLE_PAGES = 512
"""Sampled pages per GiB."""

_TIME_MS = (50, 60000)
_SAMPLE_PAGES = (128, 16384)
_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DirtyRateRequest:
    """One measurement.

    Attributes:
        calc_time_ms: How long to measure.
        mode: ``page-sampling`` or ``dirty-bitmap``.
        sample_pages: Pages per GiB; 0 where no page is sampled.
    """

    calc_time_ms: int
    mode: str
    sample_pages: int


@dataclass(frozen=True, slots=True)
class DirtyRateState:
    """What ``query-dirty-rate`` is answered from.

    Attributes:
        status: ``unstarted``, ``measuring`` or ``measured``.
        start_time_s: When the last measurement began, in seconds since the epoch.
        request: What was measured.
        rate_mib_per_s: Result of a finished measurement.
    """

    status: str = "unstarted"
    start_time_s: int = 0
    request: DirtyRateRequest = DirtyRateRequest(0, "page-sampling", 0)
    rate_mib_per_s: int | None = None


def check_request(
    calc_time: int, unit: str, sample_pages: int | None, mode: str
) -> DirtyRateRequest:
    """Check arguments of ``calc-dirty-rate``.

    Args:
        calc_time: In ``unit``.
        unit: ``second`` or ``millisecond``.
        sample_pages: None if it was not given.
        mode: A DirtyRateMeasureMode.

    Raises:
        QMPError: With QEMU's text.
    """
    calc_time_ms = calc_time * 1000 if unit == "second" else calc_time
    if not _TIME_MS[0] <= calc_time_ms <= _TIME_MS[1]:
        raise QMPError("Calculation time is out of range [50ms, 60000ms].")
    if sample_pages is not None and mode != "page-sampling":
        raise QMPError("sample-pages is used only in page-sampling mode")
    if sample_pages is None:
        sample_pages = DEFAULT_SAMPLE_PAGES
    if not _SAMPLE_PAGES[0] <= sample_pages <= _SAMPLE_PAGES[1]:
        raise QMPError("sample-pages is out of range[128, 16384].")
    if mode == "dirty-ring":
        raise QMPError("mode dirty-ring is not enabled, use other method instead.")
    return DirtyRateRequest(calc_time_ms, mode, sample_pages if mode == "page-sampling" else 0)


def pages_to_sample(block_bytes: int, page_count: int, sample_pages: int) -> int:
    """How many pages of a block to sample, at least one."""
    return min(page_count, max(1, block_bytes * sample_pages // _GIB))


def rate_mib_per_s(changed: int, sampled: int, total_bytes: int, elapsed_s: float) -> int:
    """Dirtied MiB per second, from the share of the sampled pages that changed."""
    if not sampled or elapsed_s <= 0:
        return 0
    return int(total_bytes * changed / sampled / _MIB / elapsed_s)


def rate_of_bytes(written_bytes: int, elapsed_s: float) -> int:
    """Dirtied MiB per second, from the pages that were written."""
    return int(written_bytes / _MIB / elapsed_s) if elapsed_s > 0 else 0

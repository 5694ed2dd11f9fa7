"""How far a migration is: ``query-migrate`` in numbers and words for people. Pure."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

ENDED = ("completed", "failed", "cancelled")
WAITING_FOR_A_PERSON = ("postcopy-paused", "pre-switchover")
NOT_BEGUN = "none"

PLAIN_WORDS = {
    "pre-switchover": "waits for migrate-continue",
    "postcopy-device": "the guest moves now, before its memory",
    "postcopy-active": "the guest has moved, its memory follows",
    "postcopy-paused": "the connection is lost and nothing else, migrationctl recover goes on",
    "postcopy-recover-setup": "connecting again",
    "postcopy-recover": "connected again, the ends compare what is missing",
}
"""What a status means, where its name does not say it."""

_RATE_WINDOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a migration.

    Attributes:
        status: ``query-migrate``'s, or ``none`` before any migration.
        total_bytes: RAM of the guest; 0 where this side does not count.
        remaining_bytes: RAM that is still to be sent, as known now.
        transferred_bytes: Sent so far, with everything that was sent twice.
        rate_bytes_per_s: Over the last two seconds, or over all when it has ended.
        eta_s: Time left at this rate and the guest's dirty rate; None when it does not end.
        passes: Passes over the dirty pages.
        total_time_ms: Since the start.
        downtime_ms: How long the guest stood still at the switchover, once known.
        error: Why it failed.
    """

    status: str
    total_bytes: int = 0
    remaining_bytes: int = 0
    transferred_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    eta_s: float | None = None
    passes: int = 0
    total_time_ms: int = 0
    downtime_ms: int | None = None
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the migration is over."""
        return self.status in ENDED

    @property
    def is_moving(self) -> bool:
        """Whether it goes on by itself."""
        return not self.has_ended and self.status not in WAITING_FOR_A_PERSON

    @property
    def fraction(self) -> float:
        """Part of the RAM that has arrived, 0 to 1."""
        if self.status == "completed":
            return 1.0
        if not self.total_bytes:
            return 0.0
        return max(0.0, 1.0 - self.remaining_bytes / self.total_bytes)


class Meter:
    """Turns successive answers of ``query-migrate`` into progress."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, info: Mapping[str, object]) -> Progress:
        """Take one answer.

        Args:
            now_s: When it came, on a clock that only goes forward.
            info: The object that ``query-migrate`` returned.

        Returns:
            What it means beside the earlier ones.
        """
        ram = info.get("ram")
        ram = ram if isinstance(ram, dict) else {}
        status = str(info.get("status", NOT_BEGUN))
        transferred = _number(ram.get("transferred"))
        remaining = _number(ram.get("remaining"))
        total_time_ms = int(_number(info.get("total-time")))
        rate = self._rate(now_s, int(transferred))
        if status in ENDED and total_time_ms:
            rate = transferred * 1000 / total_time_ms
        elif not rate:
            rate = _number(ram.get("mbps")) * 1e6 / 8
        dirty_rate = _number(ram.get("dirty-pages-rate")) * _number(ram.get("page-size"))
        eta_s = None
        if remaining and rate > dirty_rate:
            eta_s = remaining / (rate - dirty_rate)
        downtime = info.get("downtime")
        error = info.get("error-desc")
        return Progress(
            status=status,
            total_bytes=int(_number(ram.get("total"))),
            remaining_bytes=int(remaining),
            transferred_bytes=int(transferred),
            rate_bytes_per_s=rate,
            eta_s=eta_s,
            passes=int(_number(ram.get("dirty-sync-count"))),
            total_time_ms=total_time_ms,
            downtime_ms=downtime if isinstance(downtime, int) else None,
            error=str(error) if error is not None else None,
        )

    def _rate(self, now_s: float, transferred: int) -> float:
        samples = self._samples
        if samples and transferred < samples[-1][1]:
            samples.clear()  # another migration has begun
        samples.append((now_s, transferred))
        while len(samples) > 2 and now_s - samples[0][0] > _RATE_WINDOW_S:
            samples.popleft()
        elapsed_s = now_s - samples[0][0]
        return (transferred - samples[0][1]) / elapsed_s if elapsed_s > 0 else 0.0


def size_text(count: float) -> str:
    """Write a number of bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate_text(bytes_per_s: float) -> str:
    """Write a rate for people: ``1.5 MiB/s``."""
    return f"{size_text(bytes_per_s)}/s"


def duration_text(seconds: float) -> str:
    """Write a time for people: ``250 ms``, ``3.2 s``, ``2:05``, ``1:02:05``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_line(progress: Progress) -> str:
    """Write one look as one line of plain text."""
    parts = [progress.status]
    if words := PLAIN_WORDS.get(progress.status):
        parts = [f"{progress.status}: {words}"]
    if progress.total_bytes:
        parts.append(f"{progress.fraction:4.0%} of {size_text(progress.total_bytes)}")
        parts.append(f"sent {size_text(progress.transferred_bytes)}")
        if progress.status not in WAITING_FOR_A_PERSON:
            parts.append(rate_text(progress.rate_bytes_per_s))
    if not progress.has_ended and progress.total_bytes:
        parts.append(f"remaining {size_text(progress.remaining_bytes)}")
    if progress.is_moving and progress.total_bytes:
        eta = "unknown" if progress.eta_s is None else duration_text(progress.eta_s)
        parts.append(f"ETA {eta}")
    if progress.has_ended and progress.total_time_ms:
        parts.append(f"in {duration_text(progress.total_time_ms / 1000)}")
    if progress.downtime_ms is not None:
        parts.append(f"downtime {progress.downtime_ms} ms")
    if progress.error:
        parts.append(progress.error)
    return ", ".join(parts)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0

"""Follow a migration: a live bar on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from migrationd.ctl.progress import (
    NOT_BEGUN,
    PLAIN_WORDS,
    WAITING_FOR_A_PERSON,
    Meter,
    Progress,
    duration_text,
    progress_line,
    rate_text,
    size_text,
)

POLL_S = 0.1
_LINE_EVERY_S = 1.0

Query = Callable[[], Awaitable[Mapping[str, object]]]


class Display(contextlib.AbstractContextManager["Display"]):
    """Where progress is shown."""

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""

    @abstractmethod
    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look, with a note beside it."""


class LineDisplay(Display):
    """A line per second while something changes, and one whenever the status does."""

    def __init__(self, console: Console, label: str = "") -> None:
        self._console = console
        self._label = f"{label} " if label else ""
        self._status = ""
        self._next_s = 0.0
        self._last = ""

    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look."""
        if progress.status == self._status and now_s < self._next_s:
            return
        self._status = progress.status
        self._next_s = now_s + _LINE_EVERY_S
        line = self._label + progress_line(progress) + (f"  {note}" if note else "")
        if line == self._last:
            return
        self._last = line
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(Display):
    """A bar with the status, and under it sizes, rate and ETA; fits 80 columns."""

    def __init__(self, console: Console, label: str = "") -> None:
        self._label = label
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look."""
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", width=4)
        status = f"{self._label} {progress.status:<9}".lstrip()
        bar = ProgressBar(total=1.0, completed=progress.fraction)
        head.add_row(Text(status, "bold"), bar, f"{progress.fraction:.0%}")
        figures = Text(f"    {_figures(progress)}", no_wrap=True, overflow="ellipsis")
        if note:
            figures.append(f"  {note}", "cyan")
        lines: list[Table | Text] = [head, figures]
        if words := PLAIN_WORDS.get(progress.status):
            lines.append(Text(f"    {words}", no_wrap=True, overflow="ellipsis"))
        self._live.update(Group(*lines), refresh=True)


def _figures(progress: Progress) -> str:
    if not progress.total_bytes:
        return progress.error or ""
    parts = [f"{size_text(progress.transferred_bytes)} sent", rate_text(progress.rate_bytes_per_s)]
    if not progress.has_ended:
        eta = "?" if progress.eta_s is None else duration_text(progress.eta_s)
        parts += [f"left {size_text(progress.remaining_bytes)}", f"ETA {eta}"]
    elif progress.total_time_ms:
        parts.append(f"in {duration_text(progress.total_time_ms / 1000)}")
    if progress.downtime_ms is not None:
        parts.append(f"downtime {progress.downtime_ms} ms")
    return "  ".join([*parts, *([progress.error] if progress.error else [])])


def make_display(console: Console, label: str = "") -> Display:
    """Choose the display that fits where the output goes."""
    return LiveDisplay(console, label) if console.is_terminal else LineDisplay(console, label)


async def follow(
    query: Query,
    display: Display,
    *,
    note: Callable[[], str] = lambda: "",
    poll_s: float = POLL_S,
    ends_when_waiting: bool = False,
) -> Progress:
    """Show a migration until it ends.

    Args:
        query: Returns what ``query-migrate`` returns.
        display: Where to show it; entered already.
        note: Text to show beside it.
        poll_s: Time between two looks.
        ends_when_waiting: Return as well when it stands still until somebody acts.

    Returns:
        The last look.
    """
    loop = asyncio.get_running_loop()
    meter = Meter()
    while True:
        now_s = loop.time()
        progress = meter.add(now_s, await query())
        display.show(now_s, progress, note())
        waits = progress.status in WAITING_FOR_A_PERSON
        if progress.has_ended or (waits and ends_when_waiting):
            return progress
        # Nothing has begun: look less often, it may be hours.
        await asyncio.sleep(poll_s if progress.status != NOT_BEGUN else max(poll_s, 0.25))

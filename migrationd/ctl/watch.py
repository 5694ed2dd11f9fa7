"""Follow a migration: a live bar on a terminal, plain lines elsewhere."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from migrationd.ctl.progress import (
    NOT_BEGUN,
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


class Display(Protocol):
    """Where progress is shown."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen."""
        ...

    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look, with a note beside it."""
        ...


class LineDisplay:
    """A line per second, and one whenever the status changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = ""
        self._next_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look."""
        if progress.status == self._status and now_s < self._next_s:
            return
        self._status = progress.status
        self._next_s = now_s + _LINE_EVERY_S
        line = progress_line(progress) + (f"  {note}" if note else "")
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Figures(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        progress: Progress | None = task.fields.get("look")
        if progress is None or not progress.total_bytes:
            return Text("")
        text = f"{size_text(progress.transferred_bytes)}  {rate_text(progress.rate_bytes_per_s)}"
        if not progress.has_ended:
            eta = "?" if progress.eta_s is None else duration_text(progress.eta_s)
            text += f"  left {size_text(progress.remaining_bytes)}  ETA {eta}"
        if progress.downtime_ms is not None:
            text += f"  downtime {progress.downtime_ms} ms"
        return Text(text)


class LiveDisplay:
    """A bar with status, rate, remaining and ETA."""

    def __init__(self, console: Console, label: str = "") -> None:
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            _Figures(),
            TextColumn("[cyan]{task.fields[note]}", markup=True),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._label = label
        self._task = self._bar.add_task(label, total=1.0, note="", look=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, now_s: float, progress: Progress, note: str = "") -> None:
        """Show one look."""
        self._bar.update(
            self._task,
            description=f"{self._label} {progress.status}".strip(),
            completed=progress.fraction,
            look=progress,
            note=note,
            refresh=True,
        )


def make_display(console: Console, label: str = "") -> Display:
    """Choose the display that fits where the output goes."""
    return LiveDisplay(console, label) if console.is_terminal else LineDisplay(console)


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

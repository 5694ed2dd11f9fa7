import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from migrationd.ctl.progress import Progress
from migrationd.ctl.watch import LineDisplay, LiveDisplay, Query, follow, make_display


def script(*statuses: str) -> Query:
    left = list(statuses)

    async def query() -> Mapping[str, object]:
        status = left.pop(0)
        return {} if status == "none" else {"status": status}

    return query


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def printed(output: Console) -> str:
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue()


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_watch_ends_with_the_migration(end: str) -> None:
    output = console(terminal=False)
    with make_display(output) as display:
        progress = await follow(script("setup", "active", "active", end), display, poll_s=0)
    assert progress.status == end
    assert printed(output).split() == ["setup", "active", end]


async def test_waiting_for_a_person_ends_it_on_request() -> None:
    output = console(terminal=False)
    with make_display(output) as display:
        query = script("active", "pre-switchover")
        progress = await follow(query, display, poll_s=0, ends_when_waiting=True)
        assert progress.status == "pre-switchover"
        query = script("pre-switchover", "completed")
        assert (await follow(query, display, poll_s=0)).status == "completed"


def test_lines_are_not_more_than_one_a_second() -> None:
    output = console(terminal=False)
    display = LineDisplay(output)
    for now_s in (0.0, 0.5, 0.9, 1.1, 1.2):
        display.show(now_s, Progress("active"), f"at {now_s}")
    assert printed(output).splitlines() == ["active  at 0.0", "active  at 1.1"]


def test_what_stands_still_is_one_line() -> None:
    output = console(terminal=False)
    display = LineDisplay(output)
    for now_s in range(5):
        display.show(float(now_s), Progress("none" if now_s < 4 else "active"))
    assert printed(output).splitlines() == ["none", "active"]


def test_bar_shows_the_figures() -> None:
    output = console(terminal=True)
    with make_display(output, "in") as display:
        assert isinstance(display, LiveDisplay)
        look = Progress("active", total_bytes=1 << 20, remaining_bytes=1 << 19, eta_s=2.0)
        display.show(0, look, "guest: ABC")
    text = printed(output)
    for part in ("in active", " 50%", "left 512.0 KiB", "ETA 2.0 s", "guest: ABC"):
        assert part in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_postcopy_is_told_in_plain_words(terminal: bool) -> None:
    output = console(terminal=terminal)
    with make_display(output) as display:
        for now_s, status in enumerate(("active", "postcopy-active", "postcopy-paused")):
            display.show(float(now_s), Progress(status, total_bytes=100, remaining_bytes=50))
    text = printed(output)
    assert "the guest has moved, its memory follows" in text
    assert "migrationctl recover goes on" in text

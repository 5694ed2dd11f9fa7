"""Who is told what, and what happens when one of the three does not want it."""

import asyncio
import contextlib
import io
from collections.abc import Iterator, Mapping

import pytest
from rich.console import Console

from migrationd.ctl import escrow as module
from migrationd.ctl.client import ClientError
from migrationd.ctl.escrow import EscrowPlan, escrow


class Listener:
    """Events of a script; then none for ever."""

    def __init__(self, events: list[dict[str, object]]) -> None:
        self._events = events

    async def get(self) -> dict[str, object]:
        if not self._events:
            await asyncio.Event().wait()
        return self._events.pop(0)

    def __aiter__(self) -> "Listener":
        return self

    async def __anext__(self) -> dict[str, object]:
        return await self.get()


class End:
    """A monitor with a run state, statuses and events."""

    def __init__(
        self, run_state: str, *statuses: str, events: list[dict[str, object]] | None = None
    ) -> None:
        self._run_state = run_state
        self._statuses = list(statuses) or ["none"]
        self._events = events or []
        self.said: list[str] = []

    async def query(self, command: str) -> dict[str, object]:
        assert command == "query-status"
        return {"status": self._run_state}

    async def query_migrate(self) -> dict[str, object]:
        many = len(self._statuses) > 1
        status = self._statuses.pop(0) if many else self._statuses[0]
        return {"status": status, "error-desc": "no route"} if status == "failed" else {
            "status": status
        }  # fmt: skip

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        self.said.append("+".join(name for name, state in capabilities.items() if state))

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        self.said.append(command if not arguments else f"{command} {arguments['uri']}")
        return {}

    @contextlib.contextmanager
    def listening(self, *names: str) -> Iterator[Listener]:
        yield Listener(self._events)


def at(seconds: int, milliseconds: int) -> dict[str, object]:
    return {"timestamp": {"seconds": seconds, "microseconds": milliseconds * 1000}}


def status(name: str) -> dict[str, object]:
    return {"event": "MIGRATION", "data": {"status": name}}


async def run(daemon: End, source: End, destination: End) -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    plan = EscrowPlan("unix:in", "unix:out")
    await escrow(daemon, source, destination, plan, console)  # type: ignore[arg-type]
    return output.getvalue()


async def test_the_order_of_things() -> None:
    daemon = End("inmigrate", "completed", events=[status("active"), status("completed")])
    source = End("running", "active", events=[at(10, 980)])
    destination = End("inmigrate", events=[at(11, 20)])
    text = await run(daemon, source, destination)
    assert destination.said == ["postcopy-ram+postcopy-preempt", "migrate-incoming unix:out"]
    assert source.said == ["return-path", "migrate unix:in"]
    assert daemon.said == [
        "events", "migrate-incoming unix:in",
        "postcopy-ram+postcopy-preempt", "migrate unix:out", "migrate-start-postcopy",
    ]  # fmt: skip
    assert "stood still for 40 ms" in text
    assert text.index("source may be ended now") < text.index("stood still")


@pytest.mark.parametrize(
    ("daemon", "source", "destination", "text"),
    [
        (End("paused"), End("running"), End("inmigrate"), "the daemon does not wait for a guest"),
        (End("inmigrate"), End("running"), End("running"), "the destination does not wait"),
        (End("inmigrate"), End("running", "failed"), End("inmigrate"), "at its source: no route"),
        (
            End("inmigrate", events=[status("failed")]),
            End("running", "active"),
            End("inmigrate"),
            "the daemon refused it",
        ),
    ],
)
async def test_a_guest_that_stays_where_it_is(
    daemon: End, source: End, destination: End, text: str
) -> None:
    with pytest.raises(ClientError, match=text):
        await run(daemon, source, destination)
    assert "migrate unix:out" not in daemon.said


async def test_a_destination_that_does_not_start_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STARTS_S", 0.01)
    daemon = End("inmigrate", "completed", events=[status("completed")])
    text = await run(daemon, End("running", "active", events=[at(1, 0)]), End("inmigrate"))
    assert "has not started the guest" in text

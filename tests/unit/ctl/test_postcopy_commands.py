"""What ``migrationctl recover`` says to whom, with monitors made by hand."""

from collections.abc import Mapping

import pytest

from migrationd.ctl import postcopy_commands
from migrationd.ctl.client import ClientError

NOT_PAUSED = "Migrate recover can only be run when postcopy is paused."
NOTHING_TO_PAUSE = "migrate-pause is currently only supported during postcopy-active state"


class End:
    """A monitor whose status follows a script; refusals by command."""

    def __init__(
        self, *statuses: str | None, refuses: Mapping[str, list[str]] | None = None
    ) -> None:
        self.statuses = list(statuses)
        self.refuses = dict(refuses or {})
        self.said: list[tuple[str, bool]] = []

    async def query_migrate(self) -> dict[str, object]:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return {"status": status, "error-desc": "refused"}

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> object:
        self.said.append((command if not arguments else f"{command} {arguments['uri']}", oob))
        if texts := self.refuses.get(command):
            raise ClientError(texts.pop(0))
        return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy_commands, "SETTLE_S", 0.2)
    monkeypatch.setattr(postcopy_commands, "_POLL_S", 0.001)


async def recover(source: End, destination: End, connect: str | None = None) -> None:
    await postcopy_commands.recover(source, destination, "unix:d", connect)  # type: ignore[arg-type]


async def test_both_are_paused() -> None:
    source, destination = End("postcopy-paused", "postcopy-recover"), End("postcopy-paused")
    await recover(source, destination, "unix:via")
    assert destination.said == [("migrate-recover unix:d", True)]
    assert source.said == [("migrate unix:via", False)]


async def test_ends_that_have_not_noticed_are_paused_first() -> None:
    source = End("postcopy-active", "postcopy-active", "postcopy-paused", "postcopy-active")
    destination = End("x", refuses={"migrate-recover": [NOT_PAUSED, NOT_PAUSED]})
    await recover(source, destination)
    assert source.said == [("migrate-pause", True), ("migrate unix:d", False)]
    assert destination.said == [
        ("migrate-recover unix:d", True), ("migrate-pause", True),
        ("migrate-recover unix:d", True), ("migrate-recover unix:d", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "destination", "text"),
    [
        (End("completed"), End("x"), "no postcopy to recover: its status is 'completed'"),
        (End(None), End("x"), "no postcopy to recover: it has not migrated"),
        (End("postcopy-active"), End("x"), "the source is still in 'postcopy-active'"),
        (
            End("postcopy-paused"),
            End("x", refuses={"migrate-recover": ["unknown migration protocol: b"]}),
            "unknown migration protocol",
        ),
        (
            End("postcopy-paused"),
            End(
                "x",
                refuses={
                    "migrate-recover": [NOT_PAUSED] * 1000,
                    "migrate-pause": [NOTHING_TO_PAUSE] * 1000,
                },
            ),
            "the destination does not pause",
        ),
        (End("postcopy-paused"), End("x"), "the source is not connected: refused"),
    ],
)
async def test_what_cannot_be_recovered(source: End, destination: End, text: str) -> None:
    with pytest.raises(ClientError, match=text):
        await recover(source, destination)

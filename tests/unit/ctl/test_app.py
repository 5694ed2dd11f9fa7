import re
import sys

import pytest
from typer.testing import CliRunner

from migrationd import __version__
from migrationd.ctl.app import app, main

run = CliRunner().invoke


def test_help_lists_the_commands() -> None:
    result = run(app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "status",
        "watch",
        "migrate",
        "start-postcopy",
        "pause",
        "recover",
        "escrow",
        "cancel",
        "demo",
    ):
        assert re.search(rf"\b{command}\b", result.output)
        assert run(app, [command, "-h"]).exit_code == 0


def test_version() -> None:
    assert run(app, ["--version"]).output.strip() == f"migrationctl {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["status"],
        ["-s"],
        ["-s", "x", "migrate"],
        ["pause"],
        ["-s", "x", "recover", "y"],
        ["-s", "x", "migrate", "u", "-c", "a=b"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert run(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-s", "/nowhere/qmp", "status"], "cannot connect to /nowhere/qmp: No such file"),
        (["-s", "x", "migrate", "u", "--max-bandwidth", "fast"], "'fast' is not a size"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["migrationctl", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("migrationctl: ")
    assert text in line
    assert line.count("\n") == 1

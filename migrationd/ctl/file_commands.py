"""``migrationctl`` on files: ``inspect``, ``verify``, ``diff``, ``convert``.

Exit status of ``verify``: 1 if the file is not whole; of ``diff``: 1 if the files differ and
2 in case of trouble, as diff(1).
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from migrationd.ctl.client import parse_size
from migrationd.ctl.printable import printable, say_error
from migrationd.errors import MigrationdError

console = Console()

File = Annotated[Path, typer.Argument(help="a migration file of any form")]
Offset = Annotated[
    str, typer.Option(metavar="SIZE", help="where its stream begins (file:PATH,offset=N)")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]

_LEVEL_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, verify, diff, convert):
        app.command()(command)


def inspect(
    file: File,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", "-d", metavar="NAME[:INSTANCE]", help="show the fields of a device"
        ),
    ] = None,
    offset: Offset = "0",
    json: Json = False,
) -> None:
    """Show what a migration file holds: machine, RAM, devices, and a device's fields."""
    from migrationd.ctl import inspect_file
    from migrationd.ctl.file_summary import summarize

    summary = summarize(file, position=parse_size(offset))
    sections = [
        section for name in device or () for section in inspect_file.find_devices(summary, name)
    ]
    if json:
        tree = inspect_file.as_json(summary)
        if sections:
            tree = {"devices": [inspect_file.device_json(summary, s) for s in sections]}
        inspect_file.dump_json(tree, console)
    elif sections:
        for section in sections:
            inspect_file.print_device(summary, section, console)
    else:
        inspect_file.print_summary(summary, console)


def verify(file: File, offset: Offset = "0") -> None:
    """Check that a migration file is whole: structure, framing, sums, description."""
    from migrationd.ctl.verify_file import verify as check

    findings = check(file, position=parse_size(offset))
    for finding in findings:
        style = _LEVEL_STYLES[finding.level]
        console.print(f"{finding.level:8}", style=style, end="", highlight=False)
        text = printable(f"{finding.what:12} {finding.text}")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="a migration file of any form")],
    other: Annotated[Path, typer.Argument(metavar="B", help="another one")],
    everything: Annotated[bool, typer.Option("--all", help="do not cut long lists")] = False,
    json: Json = False,
) -> None:
    """Show which pages and which device fields differ between two migration files."""
    from migrationd.ctl import diff_files, inspect_file
    from migrationd.ctl.file_guest import FileGuest

    try:
        with FileGuest(one) as left, FileGuest(other) as right:
            difference = diff_files.compare(left.guest, right.guest)
    except MigrationdError as error:
        say_error(str(error))
        raise typer.Exit(2) from None
    if json:
        inspect_file.dump_json(diff_files.as_json(difference), console)
    else:
        names = (str(one), str(other))
        diff_files.print_difference(difference, names, console, everything=everything)
    if not difference.is_equal:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="a migration file of any form")],
    target: Annotated[Path, typer.Argument(help="the file to write")],
    to: Annotated[str, typer.Option(metavar="FORM", help="plain, mapped-ram, zstd or libvirt")],
    level: Annotated[int, typer.Option(help="of zstd")] = 3,
    domain: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="libvirt: the domain's XML, or a save image with it"),
    ] = None,
    offset: Offset = "0",
    force: Annotated[bool, typer.Option("--force", "-f", help="replace the target")] = False,
) -> None:
    """Write a guest into another form of migration file."""
    from migrationd.ctl.convert_file import FORMS, Conversion
    from migrationd.ctl.convert_file import convert as write
    from migrationd.ctl.progress import size_text

    if to not in FORMS:
        raise typer.BadParameter(f"'{to}', expected {', '.join(FORMS)}", param_hint="--to")
    wanted = Conversion(to, level, parse_size(offset), domain, force)
    size = write(source, target, wanted)
    text = printable(f"{target}: {to}, {size_text(size)}")
    console.print(text, highlight=False, markup=False, soft_wrap=True)

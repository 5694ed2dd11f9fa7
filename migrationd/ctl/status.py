"""``migrationctl status``: one monitor on one screen."""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrationd.ctl.client import ClientError, Monitor
from migrationd.ctl.progress import Meter, Progress, progress_line


@dataclass(frozen=True, slots=True)
class Status:
    """What a monitor says about itself.

    Attributes:
        program: Program and version.
        name: Guest name, or an empty text.
        run_state: ``query-status``'s.
        progress: The migration.
        listening: Addresses on which an incoming migration is awaited.
        capabilities: Those that are on.
        blocked: Why the guest cannot migrate.
    """

    program: str
    name: str
    run_state: str
    progress: Progress
    listening: tuple[str, ...]
    capabilities: tuple[str, ...]
    blocked: tuple[str, ...]


async def read_status(monitor: Monitor) -> Status:
    """Ask a monitor.

    Raises:
        ClientError: It does not answer.
    """
    version = await monitor.query("query-version")
    info = await monitor.query_migrate()
    try:
        capabilities = await monitor.execute("query-migrate-capabilities")
    except ClientError:
        capabilities = None
    return Status(
        program=_program(version),
        name=str((await monitor.query("query-name")).get("name", "")),
        run_state=str((await monitor.query("query-status")).get("status", "unknown")),
        progress=Meter().add(time.monotonic(), info),
        listening=tuple(_address(entry) for entry in _dicts(info.get("socket-address"))),
        capabilities=tuple(
            str(entry["capability"]) for entry in _dicts(capabilities) if entry.get("state")
        ),
        blocked=tuple(str(reason) for reason in _list(info.get("blocked-reasons"))),
    )


def status_rows(status: Status) -> list[tuple[str, str]]:
    """List what there is to show: name and value."""
    none = status.progress.status == "none"
    rows = [("program", status.program)]
    rows += [("guest", status.name)] if status.name else []
    rows += [
        ("run state", status.run_state),
        ("migration", "none yet" if none else progress_line(status.progress)),
    ]
    rows += [("listens on", address) for address in status.listening]
    rows += [("capabilities", ", ".join(status.capabilities) or "none on")]
    rows += [("blocked", reason) for reason in status.blocked]
    return rows


def show_status(status: Status, console: Console) -> None:
    """Print a status: a table on a terminal, a line for each value elsewhere."""
    rows = status_rows(status)
    if not console.is_terminal:
        for name, value in rows:
            console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def _program(version: dict[str, object]) -> str:
    qemu = version.get("qemu")
    numbers = qemu if isinstance(qemu, dict) else {}
    release = ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro"))
    package = str(version.get("package", "")).strip()
    if package.startswith("migrationd"):
        return f"{package} (QMP of QEMU {release})"
    return f"QEMU {release} {package}".strip()


def _address(entry: dict[str, object]) -> str:
    match entry.get("type"):
        case "inet":
            return f"tcp:{entry.get('host')}:{entry.get('port')}"
        case "unix":
            return f"unix:{entry.get('path')}"
        case "vsock":
            return f"vsock:{entry.get('cid')}:{entry.get('port')}"
        case kind:
            return f"{kind}:{entry.get('str', '')}"


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _dicts(value: object) -> list[dict[str, object]]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]

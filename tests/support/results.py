"""Rows that tests put into the tables at the end of a run."""

from pathlib import Path

import pytest

TABLES = pytest.StashKey[dict[str, list[tuple[str, ...]]]]()


def add_row(
    config: pytest.Config, table: str, row: tuple[str, ...], *, head: tuple[str, ...] | None = None
) -> None:
    """Add a row, below a head if it is the first; without one, the first row is the head."""
    rows = config.stash.setdefault(TABLES, {}).setdefault(table, [])
    if head is not None and not rows:
        rows.append(head)
    rows.append(row)


def render(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip


FAULTS = "bad input: typed error, guest intact, next migration works"


def add_fault(config: pytest.Config, trouble: str, said: str, then: str) -> None:
    """Add a row to the table of all that went wrong on purpose."""
    said = said.removeprefix("load of migration failed: ").replace(str(Path.home()), "~")
    add_row(config, FAULTS, (trouble, said, then), head=("trouble", "error-desc", "afterwards"))

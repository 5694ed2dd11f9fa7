"""Rows that tests put into the tables at the end of a run."""

import pytest

TABLES = pytest.StashKey[dict[str, list[tuple[str, ...]]]]()


def add_row(config: pytest.Config, table: str, row: tuple[str, ...]) -> None:
    """Add a row; the first row of a table is its head."""
    config.stash.setdefault(TABLES, {}).setdefault(table, []).append(row)


def render(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip

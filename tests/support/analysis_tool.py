"""QEMU's own reader of migration files, run as a program and never part of this one.

Taken from ``$MIGRATIOND_ANALYZE_MIGRATION``, from beside the QEMUs that tests use, or
fetched from QEMU's repository.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from migrationd.ctl.qemu_process import qemu_directory

VARIABLE = "MIGRATIOND_ANALYZE_MIGRATION"
URL = "https://gitlab.com/qemu-project/qemu/-/raw/v10.1.0/scripts/analyze-migration.py"
_FETCH_WAIT_S = 5.0


@cache
def _find() -> Path | str:
    """Where the program is, or why it is not."""
    named = os.environ.get(VARIABLE)
    beside = qemu_directory() / "analyze-migration.py"
    for path in (Path(named) if named else None, beside):
        if path is not None and path.is_file():
            return path
    try:
        with urllib.request.urlopen(URL, timeout=_FETCH_WAIT_S) as answer:
            program = answer.read()
    except (urllib.error.URLError, OSError) as error:
        return f"QEMU's analyze-migration.py: {error}; put it to {beside} or name it in ${VARIABLE}"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(program)
    return beside


def analyze(file: Path) -> dict[str, Any]:
    """What the program reads from a file: section name and number to its fields.

    Skips the test where the program cannot be had.

    Raises:
        AssertionError: It cannot read the file.
    """
    program = _find()
    if isinstance(program, str):
        pytest.skip(program)
    command = [sys.executable, "-W", "ignore", str(program), "-f", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found

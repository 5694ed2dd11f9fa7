import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "migrationd@.service"


def analyze(*arguments: str) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    result = subprocess.run(
        ["systemd-analyze", *arguments, str(UNIT)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_systemd_accepts_the_unit() -> None:
    assert analyze("verify") == ""


def test_service_is_confined() -> None:
    report = analyze("security", "--offline=true", "--threshold=20")
    assert "OK" in report.splitlines()[-1]

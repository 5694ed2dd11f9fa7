"""A disk that fails in the middle of a save: the guest stays, and the next save works."""

import shutil
import subprocess
from pathlib import Path

import pytest

from migrationd.ctl.convert_file import Conversion, convert
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.diff_files import compare
from migrationd.ctl.file_guest import FileGuest
from migrationd.errors import MigrationdError
from tests.support.results import add_fault

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc"),
]

SOURCE = Path(__file__).parents[1] / "support" / "failing_disk.c"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a disk fail."""
    path = tmp_path_factory.mktemp("library") / "failing_disk.so"
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o", path, SOURCE]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("moment", ["in the middle", "at the end"])
@pytest.mark.parametrize("form", ["plain", "mapped-ram", "multifd", "ram-dir"])
async def test_a_failing_disk(
    form: str, moment: str, library: Path, parked_file: tuple[Path, str, str], tmp_path: Path,
    closing: list[object], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAILING_DISK", str(disk))
    monkeypatch.setenv("FAILING_AFTER", str(3 << 20))
    if moment == "at the end":
        monkeypatch.setenv("FAILING_SYNC", "1")
    if form == "ram-dir":
        said = await arrive_on(disk, parked_file[0], closing)
    else:
        daemon = await DaemonProcess.start(incoming=f"file:{parked_file[0]}")
        closing.append(daemon)
        await daemon.wait_run_state("paused")
        await daemon.set_parameters({"max-bandwidth": 0})
        await daemon.set_capabilities({"mapped-ram": form != "plain", "multifd": form == "multifd"})
        await daemon.execute("migrate", {"uri": f"file:{disk}/guest"})
        info = await daemon.wait_migration("failed")
        said = str(info["error-desc"])
        assert await daemon.run_state() == "paused"
        if moment == "in the middle":
            with pytest.raises(MigrationdError):
                FileGuest(disk / "guest")
        (disk / "works").touch()
        await daemon.execute("migrate", {"uri": f"file:{disk}/again"})
        await daemon.wait_migration("completed")
        assert same_guest(parked_file[0], disk / "again", tmp_path)
    assert "Input/output error" in said
    add_fault(request.config, f"EIO {moment}, {form}", said, "held, next save whole")


async def arrive_on(disk: Path, path: Path, closing: list[object]) -> str:
    """A guest comes to rest in a directory that fails, and then in one that works."""
    daemon = await DaemonProcess.start(
        incoming="defer", arguments=["-name", "vm1", "-ram-dir", str(disk)]
    )
    closing.append(daemon)
    arguments = {"uri": f"file:{path}", "exit-on-error": False}
    await daemon.execute("migrate-incoming", arguments)
    info = await daemon.wait_migration("failed")
    assert await daemon.run_state() == "inmigrate"
    assert [entry.name for entry in disk.iterdir()] == ["vm1.lock"]
    (disk / "works").touch()
    await daemon.execute("migrate-incoming", arguments)
    await daemon.wait_migration("completed")
    assert await daemon.run_state() == "paused"
    return str(info["error-desc"])


def same_guest(one: Path, other: Path, directory: Path) -> bool:
    # Both in one form: how a guest was written is part of what is compared.
    for number, path in enumerate((one, other)):
        convert(path, directory / str(number), Conversion("plain"))
    with FileGuest(directory / "0") as left, FileGuest(directory / "1") as right:
        return compare(left.guest, right.guest).is_equal

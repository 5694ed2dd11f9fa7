from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.peer_process import PeerError, PeerProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, installed_versions, qemu_version


def make_fake_qemu(directory: Path, version: str) -> Path:
    path = directory / version / "qemu-system-x86_64"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}.3 (Debian)'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIGRATIOND_QEMU_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


def test_no_qemu(folder: Path) -> None:
    assert find_qemu() is None
    assert installed_versions() == []


def test_releases_are_found_in_order(folder: Path) -> None:
    new, old = make_fake_qemu(folder, "10.0"), make_fake_qemu(folder, "9.2")
    assert installed_versions() == ["9.2", "10.0"]
    assert find_qemu("10.0") == str(new)
    assert find_qemu("9.2") == str(old)
    assert find_qemu("8.0") is None


def test_version_of_the_path_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make_fake_qemu(folder / "elsewhere", "7.2")
    monkeypatch.setenv("PATH", f"{binary.parent}:/usr/bin:/bin")
    assert qemu_version(str(binary)) == "7.2"
    assert find_qemu("7.2") == find_qemu() == str(binary)


async def test_missing_qemu_names_the_package(folder: Path) -> None:
    with pytest.raises(PeerError, match="apt-get install qemu-system-arm"):
        await QemuProcess.start(guest=BootGuest("aarch64"))


async def test_guest_that_does_not_fit() -> None:
    with pytest.raises(PeerError, match="more than 4 MiB"):
        await QemuProcess.start("/bin/true", guest=BootGuest(counted_pages=1024), memory_mib=4)


async def test_process_that_ends_at_once_is_quoted() -> None:
    directory = PeerProcess.make_directory()
    with pytest.raises(PeerError, match="peer ended with status 3: no such machine"):
        await PeerProcess.spawn(
            ["/bin/sh", "-c", "echo no such machine; exit 3"], name="peer", directory=directory
        )
    assert not directory.exists()


async def test_program_that_is_not_there() -> None:
    directory = PeerProcess.make_directory()
    with pytest.raises(PeerError, match="peer cannot be started"):
        await PeerProcess.spawn(["/nowhere/qemu"], name="peer", directory=directory)
    assert not directory.exists()


async def test_silent_process_is_given_up() -> None:
    directory = PeerProcess.make_directory()
    with pytest.raises(PeerError, match="no monitor after"):
        await PeerProcess.spawn(
            ["/bin/sleep", "60"], name="peer", directory=directory, timeout_s=0.05
        )

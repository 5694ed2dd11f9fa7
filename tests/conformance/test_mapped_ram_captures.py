"""Files that real QEMUs wrote with ``mapped-ram``, opened as guests at rest."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from migrationd.codec.constants import QEMU_VM_SECTION_FULL
from migrationd.codec.vmdescription import device_sizes
from migrationd.daemon.shelter import open_saved
from migrationd.store.mapped_ram_reader import read_contents
from migrationd.store.parked_directory import ParkedDirectory, SavedGuest
from migrationd.store.sidecar import Sidecar
from tests.conformance.captures import DIRECTORY, Capture, all_captures

FILES = [capture for capture in all_captures() if capture.is_mapped_ram]


def write_file(capture: Capture, path: Path) -> None:
    path.write_bytes(gzip.decompress((DIRECTORY / capture.entry["file"]).read_bytes()))


@pytest.mark.parametrize("capture", FILES, ids=[capture.name for capture in FILES])
def test_a_file_of_qemu_opens_with_the_memory_of_its_guest(
    capture: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    write_file(capture, path)
    fd = os.open(path, os.O_RDONLY)
    contents = read_contents(fd, "file", position=capture.entry["stream_offset"])
    entry = capture.entry
    assert contents.configuration.machine == entry["machine"]
    assert [[b.idstr, b.used_length] for b in contents.blocks] == entry["ram_blocks"]
    assert contents.has_switchover_start == ("SWITCHOVER_START" in entry["commands"])
    assert contents.vmdescription is not None
    devices = [s for s in (*contents.early, *contents.late) if s.kind == QEMU_VM_SECTION_FULL]
    described = device_sizes(contents.vmdescription)
    assert [(d.idstr, d.instance_id, len(d.body)) for d in devices] == [
        (size.idstr, size.instance_id, size.size) for size in described
    ]

    guest = open_saved(SavedGuest(fd, contents, Sidecar("vm1")))
    oracle = capture.scenario["ram_oracle"]
    block = next(block for block in guest.ram if block.idstr == oracle["block"])
    memory = b"".join(bytes(block.page(n)) for n in range(oracle["length"] // block.page_size))
    assert hashlib.sha256(memory).hexdigest() == oracle["sha256"]
    assert guest.next_run_state == (
        "prelaunch" if "-S" in capture.scenario["arguments"] else "running"
    )
    guest.close()


def test_a_file_of_qemu_in_the_directory_is_offered(tmp_path: Path) -> None:
    capture = next(c for c in FILES if c.name == "111-mapped-ram-pc")
    write_file(capture, tmp_path / "vm1.mapped-ram")
    directory = ParkedDirectory(tmp_path, "vm1")
    saved = directory.find()
    assert saved is not None
    guest = open_saved(saved)
    assert guest.identity.machine == "pc-i440fx-11.1"
    assert guest.seen.switchover_start
    guest.close()
    directory.close()

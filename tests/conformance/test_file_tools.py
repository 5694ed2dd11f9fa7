"""The file tools on files and streams that real QEMUs wrote."""

import gzip
import hashlib
from pathlib import Path

import pytest

from migrationd.codec.device_fields import describe_devices
from migrationd.codec.vmdescription import device_sizes
from migrationd.ctl.convert_file import Conversion, convert
from migrationd.ctl.diff_files import compare
from migrationd.ctl.file_guest import FileGuest
from migrationd.ctl.file_summary import FileSummary, summarize
from migrationd.ctl.verify_file import verify
from tests.conformance.captures import DIRECTORY, Capture, captures

STREAMS = [capture for capture in captures("main stream") if capture.is_complete]
WHOLE = [
    capture
    for capture in STREAMS
    if capture.is_mapped_ram or "-exec-" in capture.name or "-file-" in capture.name
]


def write_file(capture: Capture, path: Path) -> int:
    """The file as QEMU left it; returns where its stream begins."""
    path.write_bytes(gzip.decompress((DIRECTORY / capture.entry["file"]).read_bytes()))
    return int(capture.entry.get("stream_offset") or 0)


def described_fields(summary: FileSummary) -> int:
    """Fields of all devices, which must cover their bodies without a rest."""
    assert summary.description is not None
    total = 0
    descriptions = describe_devices(summary.description)
    assert len(descriptions) == len(device_sizes(summary.description))
    for description, section in zip(descriptions, summary.devices, strict=True):
        fields, problem = description.fields(section.body)
        assert problem is None, (description.idstr, problem)
        total += len(fields)
    return total


@pytest.mark.parametrize("capture", STREAMS, ids=[capture.name for capture in STREAMS])
def test_verify_finds_nothing_wrong_and_every_field_is_decoded(
    capture: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    position = write_file(capture, path)
    errors = [f for f in verify(path, position=position) if f.level == "error"]
    assert errors == []
    summary = summarize(path, position=position)
    if summary.description is not None:
        assert described_fields(summary) > 400


@pytest.mark.parametrize("capture", WHOLE, ids=[capture.name for capture in WHOLE])
def test_conversion_keeps_pages_and_fields(capture: Capture, tmp_path: Path) -> None:
    path = tmp_path / "file"
    position = write_file(capture, path)
    oracle = capture.scenario["ram_oracle"]
    with FileGuest(path, position=position) as original:
        for form in ("plain", "mapped-ram", "zstd"):
            target = tmp_path / form
            convert(path, target, Conversion(form, position=position))
            with FileGuest(target) as converted:
                assert compare(original.guest, converted.guest).is_equal
                block = next(b for b in converted.guest.ram if b.idstr == oracle["block"])
                pages = range(oracle["length"] // block.page_size)
                memory = b"".join(bytes(block.page(n)) for n in pages)
                assert hashlib.sha256(memory).hexdigest() == oracle["sha256"]

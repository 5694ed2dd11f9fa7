"""Any file gives a summary or an error of ours, in bounded time."""

import contextlib
import gzip
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrationd.ctl.convert_file import Conversion, convert
from migrationd.ctl.file_guest import FileGuest
from migrationd.ctl.file_summary import summarize
from migrationd.ctl.inspect_file import as_json, fields_of
from migrationd.ctl.verify_file import verify
from migrationd.errors import MigrationdError
from tests.conformance.captures import DIRECTORY
from tests.support.fuzzing import cases

FUZZ = settings(max_examples=cases(60))
FORMS = ("plain", "zstd", "libvirt", "mapped-ram")


@cache
def seed(form: str) -> bytes:
    """A file of a real guest in this form."""
    plain = gzip.decompress((DIRECTORY / "111-exec-pc.bin.gz").read_bytes())
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "plain"), Path(directory, "target")
        source.write_bytes(plain)
        domain = Path(directory, "domain")
        domain.write_text("<domain/>")
        convert(source, target, Conversion(form, domain=domain))
        return target.read_bytes()


@pytest.mark.parametrize("form", FORMS)
@FUZZ
@given(st.data())
def test_mutated_files(form: str, data: st.DataObject) -> None:
    content = bytearray(seed(form))
    # Most of a mapped-ram file is holes and pages: aim at what is neither.
    places = st.integers(0, len(content) - 1)
    if form == "mapped-ram":
        head = st.integers(0, 200)
        tail = st.integers(len(content) - 100_000, len(content) - 1)
        places = head | st.integers(1 << 20, (1 << 20) + 200).map(lambda n: n + 131072) | tail
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(places)
        value = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8))
        content[at : at + len(value)] = value
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        path = Path(file.name)
        findings = verify(path)
        try:
            summary = summarize(path)
        except MigrationdError:
            assert any(finding.level == "error" for finding in findings)
            return
        as_json(summary)
        for section in summary.sections:
            fields, _ = fields_of(summary, section)
            ends = [0, *(field.offset + field.size for field in fields)]
            assert all(f.offset >= end for f, end in zip(fields, ends, strict=False))
            assert ends[-1] <= len(section.body)
        with contextlib.suppress(MigrationdError):  # what can be counted may not be a guest
            FileGuest(path).guest.close()

"""Every recorded section of dirty bitmaps is read, and written again byte for byte."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from migrationd.codec.dirty_bitmap import SECTION, BitmapReader, BitmapWriter
from migrationd.codec.records import OpaqueSection
from migrationd.codec.stream import StreamDecoder
from migrationd.ctl.file_summary import summarize
from migrationd.ctl.inspect_file import as_json, print_summary
from migrationd.ctl.verify_file import verify
from tests.conformance.captures import Capture, captures


def recorded() -> list[Capture]:
    return [c for c in captures("main stream") if "dirty-bitmaps" in c.name]


@pytest.mark.parametrize("capture", recorded(), ids=lambda capture: capture.name)
def test_recorded_sections_are_written_again_as_they_were(capture: Capture) -> None:
    decoder, reader, writer = StreamDecoder(), BitmapReader(), BitmapWriter()
    decoder.feed(capture.data())
    decoder.feed_eof()
    assert len(recorded()) == 6
    bodies = 0
    while (record := decoder.next_record()) is not None:
        if isinstance(record, OpaqueSection) and record.idstr == SECTION:
            bodies += 1
            assert writer.write(reader.read(record.body)) == record.body
    assert bodies >= 3


def test_inspect_and_verify_show_them(tmp_path: Path) -> None:
    capture = next(c for c in recorded() if c.name.startswith("100-dirty-bitmaps-pc"))
    path = tmp_path / "stream"
    path.write_bytes(capture.data())
    summary = summarize(path)
    shown = as_json(summary)["dirty-bitmaps"]
    assert [(entry["node"], entry["name"], entry["granularity"]) for entry in shown] == [
        ("n0", "bm1", 4096),
        ("n0", "bm0", 65536),
    ]
    assert all(entry["complete"] and entry["enabled"] for entry in shown)
    console = Console(file=StringIO(), width=120)
    print_summary(summary, console)
    assert isinstance(console.file, StringIO)
    assert "'bm1' of node 'n0', 0 B marked, 4.0 KiB per bit, enabled" in console.file.getvalue()
    findings = [finding for finding in verify(path) if finding.what == "disk bitmaps"]
    assert [finding.text for finding in findings] == ["2, each with its end"]

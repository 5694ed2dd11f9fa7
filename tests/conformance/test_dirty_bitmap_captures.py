"""Every recorded section of dirty bitmaps is read, and written again byte for byte."""

import pytest

from migrationd.codec.dirty_bitmap import SECTION, BitmapReader, BitmapWriter
from migrationd.codec.records import OpaqueSection
from migrationd.codec.stream import StreamDecoder
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

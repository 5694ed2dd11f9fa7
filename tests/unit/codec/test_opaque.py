"""Device sections have no length: where they end, and who tells."""

import pytest

from migrationd.codec.records import Command, EndOfStream, OpaqueSection, Record, VmDescription
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import StreamCorrupt, StreamError, StreamLimit, StreamTruncated
from tests.unit.codec.support import (
    END,
    FOOTER,
    HEAD,
    be,
    cstr8,
    decode,
    devices,
    drain,
    full,
    ram_start,
    vmdescription,
)

START = HEAD + ram_start({"a": 1})
DONE = END + FOOTER


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
def test_sections_end_at_their_footer(piece: int) -> None:
    tail = full(2, "timer", b"abc") + full(3, "cpu", b"", 1) + full(4, "cpu", bytes(300), 2)
    sizes = [("timer", 0, 3), ("cpu", 1, 0), ("cpu", 2, 300)]
    found = decode(START + DONE + tail + vmdescription(sizes), piece=piece)
    assert devices(found) == [("timer", 0, b"abc"), ("cpu", 1, b""), ("cpu", 2, bytes(300))]
    assert isinstance(found[-2], EndOfStream)
    assert isinstance(found[-1], VmDescription)


def test_a_footer_in_a_body_is_no_end_if_no_element_follows() -> None:
    body = b"\x7e\0\0\0\x02" + b"zz" + b"\x7e\0\0\0\x02\x04\xff\xff\xff\xff\x01a" + b"\x7e\0\0\0"
    found = decode(START + DONE + full(2, "dev", body) + vmdescription([("dev", 0, len(body))]))
    assert devices(found) == [("dev", 0, body)]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_a_forged_section_in_a_body_is_seen_through(piece: int) -> None:
    # A guest can write this into a device's memory.
    body = b"x" + b"\x7e\0\0\0\x02" + full(9, "forged", b"evil") + b"yyyy"
    tail = full(2, "dev", body) + full(3, "last", b"1234")
    sizes = [("dev", 0, len(body)), ("last", 0, 4)]
    found = decode(START + DONE + tail + vmdescription(sizes), piece=piece)
    assert devices(found) == [("dev", 0, body), ("last", 0, b"1234")]


def test_a_forged_section_with_the_id_of_the_next_is_seen_through() -> None:
    body = b"x" + b"\x7e\0\0\0\x02" + full(3, "forged", b"evil") + b"yyyy"
    tail = full(2, "dev", body) + full(3, "last", b"1234")
    sizes = [("dev", 0, len(body)), ("last", 0, 4)]
    found = decode(START + DONE + tail + vmdescription(sizes))
    assert devices(found) == [("dev", 0, body), ("last", 0, b"1234")]


def test_a_forged_section_with_the_name_of_the_next_is_seen_through() -> None:
    forged = b"\x7e\0\0\0\x02" + b"\x04\0\0\0\x03" + cstr8("last") + be(0, 4) + be(1, 4)
    body = b"x" + forged + b"yyyy"
    tail = full(2, "dev", body) + full(3, "last", b"1234")
    sizes = [("dev", 0, len(body)), ("last", 0, 4)]
    found = decode(START + DONE + tail + vmdescription(sizes))
    assert devices(found) == [("dev", 0, body), ("last", 0, b"1234")]


def test_a_forged_open_section_is_seen_through_without_end_of_input() -> None:
    # No footer of section 9 ever comes.
    body = b"\x7e\0\0\0\x02\x04\0\0\0\x09" + cstr8("forged") + be(0, 4) + be(1, 4) + b"zz"
    stream = START + DONE + full(2, "dev", body) + vmdescription([("dev", 0, len(body))])
    decoder = StreamDecoder()
    out: list[object] = []
    decoder.feed(stream)
    drain(decoder, out)  # type: ignore[arg-type]
    assert not decoder.finished
    decoder.idle()
    drain(decoder, out)  # type: ignore[arg-type]
    assert decoder.finished
    assert devices(out) == [("dev", 0, body)]  # type: ignore[arg-type]


def test_a_wrong_described_size_is_no_error() -> None:
    tail = full(2, "a", b"123") + full(3, "b", b"456")
    found = decode(START + DONE + tail + vmdescription([("a", 0, 7), ("b", 0, 3)]))
    assert devices(found) == [("a", 0, b"123"), ("b", 0, b"456")]


def test_a_description_of_other_sections_is_an_error() -> None:
    stream = START + DONE + full(2, "a", b"123") + vmdescription([("b", 0, 3)])
    with pytest.raises(StreamCorrupt, match="'b' instance 0 is described where 'a'"):
        decode(stream)
    stream = START + DONE + full(2, "a", b"123") + vmdescription([("a", 0, 3), ("b", 0, 3)])
    with pytest.raises(StreamCorrupt, match="'b' instance 0 is in one of them only"):
        decode(stream)


@pytest.mark.parametrize("text", [b"{}", b"{not json}", b'{"devices": 3}'])
def test_a_description_without_devices_proves_nothing(text: bytes) -> None:
    stream = START + DONE + full(2, "a", b"123") + b"\0\x06" + be(len(text), 4) + text
    found = decode(stream)
    assert devices(found) == [("a", 0, b"123")]
    assert found[-1] == VmDescription(text)


def test_early_sections_are_given_before_the_element_behind_them() -> None:
    early = full(7, "early", b"E")
    sizes = [("early", 0, 1), ("late", 0, 1)]
    stream = HEAD + early + ram_start({"a": 1}) + DONE + full(8, "late", b"L")
    found = decode(stream + vmdescription(sizes))
    assert isinstance(found[2], OpaqueSection)
    assert devices(found) == [("early", 0, b"E"), ("late", 0, b"L")]


def test_a_command_follows_a_section() -> None:
    found = decode(HEAD + full(7, "early", b"E") + b"\x08\0\x0b\0\0", eof=False)
    assert devices(found) == [("early", 0, b"E")]
    assert found[-1] == Command(11, b"")


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_without_footers_the_description_tells(piece: int) -> None:
    tail = full(2, "a", b"\x04123", footer=False) + full(3, "b", bytes(20), 5, footer=False)
    end = vmdescription([("a", 0, 4), ("b", 5, 20)])
    stream = HEAD + ram_start({"a": 1}, footer=False) + END + tail + end
    found = decode(stream, piece=piece, eof=False)
    assert devices(found) == [("a", 0, b"\x04123"), ("b", 5, bytes(20))]
    assert isinstance(found[-1], VmDescription)


def test_without_footers_names_tell_where_a_described_size_is_wrong() -> None:
    tail = full(2, "a", b"123", footer=False) + full(3, "b", b"45", footer=False)
    stream = HEAD + ram_start({"a": 1}, footer=False) + END + tail
    found = decode(stream + vmdescription([("a", 0, 90), ("b", 0, 2)]))
    assert devices(found) == [("a", 0, b"123"), ("b", 0, b"45")]


def test_with_neither_the_rest_is_one_section() -> None:
    tail = full(2, "a", b"123", footer=False) + full(3, "b", b"45", footer=False)
    stream = HEAD + ram_start({"a": 1}, footer=False) + END + tail + b"\0"
    found = decode(stream)
    assert devices(found) == [("a", 0, b"123" + full(3, "b", b"45", footer=False))]
    assert isinstance(found[-1], EndOfStream)
    with pytest.raises(StreamTruncated):
        decode(stream[:-1])


def test_a_suppressed_description() -> None:
    stream = START + DONE + full(2, "a", b"123") + b"\0"
    decoder = StreamDecoder()
    decoder.feed(stream)
    out: list[object] = []
    drain(decoder, out)  # type: ignore[arg-type]
    assert not decoder.finished
    decoder.idle()
    drain(decoder, out)  # type: ignore[arg-type]
    assert decoder.finished
    assert decoder.position == len(stream)
    assert isinstance(decode(stream)[-1], EndOfStream)


def test_limits() -> None:
    limits = StreamLimits(section_bytes=100)
    with pytest.raises(StreamLimit, match="no end of the section within 100"):
        decode(START + DONE + full(2, "a", bytes(101)) + b"\0", limits=limits)
    many = full(2, "a", bytes(60)) + full(3, "b", bytes(60))
    with pytest.raises(StreamLimit, match="more than 100 bytes"):
        decode(START + DONE + many + b"\0", limits=limits)
    with pytest.raises(StreamLimit):
        decode(
            HEAD + ram_start({"a": 1}, footer=False) + END + full(2, "a", bytes(400)),
            limits=StreamLimits(section_bytes=100, description_bytes=100),
        )


def test_an_error_stays() -> None:
    decoder = StreamDecoder()
    decoder.feed(HEAD + b"\x55")
    with pytest.raises(StreamError) as first:
        drain(decoder, [])
    decoder.feed(b"\0")
    with pytest.raises(StreamError) as second:
        decoder.next_record()
    assert first.value is second.value


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_silence_behind_the_last_section_and_eof_may_be_the_end(piece: int) -> None:
    """A source that suppresses the VMDESCRIPTION waits for the answer without closing."""
    decoder = StreamDecoder()
    stream = START + DONE + full(2, "timer", b"abc") + full(3, "cpu", b"a\x7e\0\0\0\x03")
    out: list[Record] = []
    for start in range(0, len(stream), piece):
        decoder.feed(stream[start : start + piece])
        drain(decoder, out)
    decoder.idle()
    drain(decoder, out)
    assert not decoder.finished
    decoder.feed(b"\0")
    drain(decoder, out)
    assert not decoder.finished
    decoder.idle()
    drain(decoder, out)
    assert decoder.finished
    assert devices(out) == [("timer", 0, b"abc"), ("cpu", 0, b"a\x7e\0\0\0\x03")]
    assert out[-1] == EndOfStream()

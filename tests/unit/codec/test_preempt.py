"""The channel of urgent pages, byte by byte."""

import pytest

from migrationd.codec.preempt import PreemptDecoder
from migrationd.codec.records import PageBatch, RamEos, ZeroBatch
from migrationd.codec.stream import StreamDecoder
from migrationd.errors import StreamCorrupt, StreamTruncated
from tests.unit.codec.support import HEAD, PAGE, be, cstr8, ram_start


def decoder() -> PreemptDecoder:
    """One that knows two blocks."""
    main = StreamDecoder()
    main.feed(HEAD + ram_start({"a": 4, "b": 4}))
    while main.next_record() is not None:
        pass
    ram = main.fork_ram()
    assert ram is not None
    return PreemptDecoder(ram)


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_pages_of_both_kinds_and_the_end(piece: int) -> None:
    stream = (
        be(0x2008) + cstr8("b") + b"x" * PAGE + be(0x3022) + b"\0" + be(2) + cstr8("a") + b"\0"
    ) + be(0x10)
    channel = decoder()
    seen: list[tuple[object, ...]] = []
    for start in range(0, len(stream), piece):
        channel.feed(stream[start : start + piece])
        while (record := channel.next_record()) is not None:
            match record:
                case PageBatch():
                    seen.append(
                        ("page", record.block, record.pages.tolist(), bytes(record.data[0][:2]))
                    )
                case ZeroBatch():
                    seen.append(("zero", record.block, record.pages.tolist()))
                case RamEos():
                    seen.append(("end",))
    assert seen == [("page", 1, [2], b"xx"), ("zero", 1, [3]), ("zero", 0, [0]), ("end",)]
    assert channel.position == len(stream)
    channel.feed_eof()


def test_it_has_a_last_block_of_its_own() -> None:
    channel = decoder()
    channel.feed(be(0x28) + bytes(PAGE))
    with pytest.raises(StreamCorrupt, match="CONTINUE before any block"):
        channel.next_record()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (be(0x200), "no page"),
        (be(0x1004), "second block list"),
        (be(0x40) + cstr8("a") + b"\1\0\2xx", "no page"),
        (be(0x4008) + cstr8("a") + bytes(PAGE), "outside"),
        (be(0x8) + cstr8("c") + bytes(PAGE), "not in the list"),
    ],
)
def test_what_is_no_page(data: bytes, message: str) -> None:
    channel = decoder()
    channel.feed(data)
    with pytest.raises(StreamCorrupt, match=message):
        channel.next_record()


def test_it_ends_inside_a_page() -> None:
    channel = decoder()
    channel.feed(be(0x8) + cstr8("a") + b"x")
    assert channel.next_record() is None
    with pytest.raises(StreamTruncated, match="inside a page"):
        channel.feed_eof()

"""RAM bodies: block list, page records in rows and alone, CONTINUE state."""

import random
import zlib

import numpy as np
import pytest

from migrationd.codec.encode import StreamEncoder
from migrationd.codec.ram import inflate_page
from migrationd.codec.ram_encode import (
    encode_block_list,
    encode_eos,
    encode_named_header,
    page_headers,
    zero_records,
)
from migrationd.codec.records import (
    CompressedPage,
    MixedBatch,
    MultifdFlush,
    PageBatch,
    RamBlockEntry,
    RamBlockList,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.errors import StreamCorrupt, StreamError, StreamLimit, StreamUnsupported
from tests.unit.codec.support import FOOTER, HEAD, PAGE, PART, be, cstr8, decode, ram_start

BLOCKS = {"a": 4096, "b": 64}
START = HEAD + ram_start(BLOCKS) + PART
EOS = be(0x10)

Flat = tuple[str, int, int, bytes]


def content(page: int) -> bytes:
    return page.to_bytes(4, "big") * (PAGE // 4)


def page(number: int, name: str | None = None) -> bytes:
    word = number * PAGE | 0x08 | (0x20 if name is None else 0)
    return be(word) + (cstr8(name) if name else b"") + content(number)


def zero(number: int, name: str | None = None, fill: int = 0) -> bytes:
    word = number * PAGE | 0x02 | (0x20 if name is None else 0)
    return be(word) + (cstr8(name) if name else b"") + bytes([fill])


def flatten(record: Record) -> list[Flat]:
    """The reference: single pages, whatever batch they came in."""
    if isinstance(record, PageBatch):
        if record.is_run:
            assert (np.diff(record.pages) == 1).all()
        pairs = zip(record.pages.tolist(), record.data, strict=True)
        return [("page", record.block, number, data.tobytes()) for number, data in pairs]
    if isinstance(record, ZeroBatch):
        fill = bytes([record.fill])
        return [("zero", record.block, number, fill) for number in record.pages.tolist()]
    if isinstance(record, MixedBatch):
        return [
            ("zero", record.block, number, b"\0")
            if at < 0
            else ("page", record.block, number, bytes(record.buffer[at : at + PAGE]))
            for number, at in zip(record.pages, record.content_at, strict=True)
        ]
    return []


def run(body: bytes, piece: int) -> tuple[list[Flat], int, bytes]:
    """Pages of a body, how many batches they came in, and the bytes encoded from them."""
    decoder, encoder = StreamDecoder(), StreamEncoder()
    data = START + body
    out: list[Flat] = []
    batches = 0
    encoded = b""
    for start in range(0, len(data), piece):
        decoder.feed(data[start : start + piece])
        while (record := decoder.next_record()) is not None:
            pages = flatten(record)
            out += pages
            batches += bool(pages)
            encoded += encoder.encode(record)
    return out, batches, encoded


def build(kinds: list[bool], numbers: list[int]) -> tuple[bytes, list[Flat]]:
    body = bytearray(page(0, "a"))
    flat: list[Flat] = [("page", 0, 0, content(0))]
    for is_page, number in zip(kinds, numbers, strict=True):
        body += page(number) if is_page else zero(number)
        flat.append(("page", 0, number, content(number)) if is_page else ("zero", 0, number, b"\0"))
    return bytes(body), flat


CHANCE = random.Random(5)
PATTERNS = {
    "pages": [True] * 700,
    "zeros": [False] * 3000,
    "alternating": [index % 2 == 0 for index in range(400)],
    "random": [CHANCE.random() < 0.5 for _ in range(400)],
    "mostly pages": [CHANCE.random() < 0.95 for _ in range(500)],
    "mostly zeros": [CHANCE.random() < 0.02 for _ in range(2000)],
    "rows of 8": [index // 8 % 2 == 0 for index in range(300)],
    "rows of 40": [index // 40 % 2 == 0 for index in range(500)],
}


@pytest.mark.parametrize("piece", [100_003, 5_000, 700_000])
@pytest.mark.parametrize("order", ["consecutive", "with gaps", "shuffled", "repeated"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows(pattern: str, order: str, piece: int) -> None:
    kinds = PATTERNS[pattern]
    numbers = list(range(1, len(kinds) + 1))
    if order == "with gaps":
        numbers = [number + number // 90 for number in numbers]
    elif order == "shuffled":
        random.Random(pattern).shuffle(numbers)
    elif order == "repeated":
        numbers = [number // 3 for number in numbers]
    body, expected = build(kinds, numbers)
    found, batches, encoded = run(body + EOS, piece)
    assert found == expected
    assert encoded == START + body + EOS
    if piece == 700_000 and order == "consecutive":
        assert batches < len(kinds) / 15


def test_batches_are_views_and_runs() -> None:
    body, _ = build([True] * 100, list(range(1, 101)))
    decoder = StreamDecoder()
    decoder.feed(START + body)
    batches = []
    while (record := decoder.next_record()) is not None:
        if isinstance(record, PageBatch):
            batches.append((len(record.pages), record.is_run, record.continued))
            assert not record.data.flags.owndata
    assert batches == [(1, True, False), (100, True, True)]


def test_fill_bytes() -> None:
    body = zero(0, "b", 7) + b"".join(zero(n, fill=9) for n in range(1, 61)) + zero(61) + EOS
    found, _, encoded = run(body, 1 << 20)
    assert [f[3] for f in found] == [b"\7"] + [b"\x09"] * 60 + [b"\0"]
    assert {f[1] for f in found} == {1}
    assert encoded == START + body


def test_continue_goes_on_across_sections_and_kinds() -> None:
    body = page(1, "b") + EOS + FOOTER + PART + zero(2) + page(3, "a") + zero(4) + EOS
    found, _, _ = run(body, 1 << 20)
    assert [(f[0], f[1], f[2]) for f in found] == [
        ("page", 1, 1),
        ("zero", 1, 2),
        ("page", 0, 3),
        ("zero", 0, 4),
    ]


def test_xbzrle_compressed_and_flush() -> None:
    packed = zlib.compress(content(6))
    body = (
        be(5 * PAGE | 0x40) + cstr8("b") + b"\1\0\3\5\1z"
        + be(6 * PAGE | 0x120) + be(len(packed), 4) + packed
        + be(0x200) + EOS + FOOTER
    )  # fmt: skip
    records = decode(START + body, eof=False)[-5:]
    assert records == [
        XbzrlePage(1, 5, b"\5\1z", False),
        CompressedPage(1, 6, packed, True),
        MultifdFlush(),
        RamEos(),
        SectionFooter(1),
    ]
    encoder = StreamEncoder(PAGE, (RamBlockEntry("a", 1), RamBlockEntry("b", 1)))
    assert b"".join(map(encoder.encode, records)) == body


def test_inflate_page() -> None:
    assert inflate_page(zlib.compress(content(3)), PAGE) == content(3)
    noise = random.Random(1).randbytes(PAGE)
    assert inflate_page(zlib.compress(noise, 0), PAGE) == noise
    for wrong in (
        zlib.compress(bytes(PAGE - 1)),
        zlib.compress(bytes(PAGE + 1)),
        zlib.compress(bytes(1 << 30 >> 6)),
        zlib.compress(bytes(PAGE)) + b"x",
        zlib.compress(bytes(PAGE))[:-1],
        b"nonsense",
        b"",
    ):
        with pytest.raises(ValueError, match=r"."):
            inflate_page(wrong, PAGE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (page(4096, "a"), "outside the block of 0x1000000 bytes"),
        (page(0, "b") + page(64), "page at 0x40000 is outside"),
        (page(0, "b") + b"".join(map(page, range(1, 80))), "page at 0x40000 is outside"),
        (zero(0, "b") + b"".join(map(zero, range(1, 80))), "page at 0x40000 is outside"),
        (zero(0, "b") + b"".join(zero(n) for n in [*range(1, 60), 99] * 9), "outside"),
        (page(0, "b") + b"\xff" * 6 + b"\xf0\x28" + bytes(PAGE), "0xfffffffffffff000 is outside"),
        (zero(1), "CONTINUE before any block"),
        (be(0x60) + b"\1\0\1a", "CONTINUE before any block"),
        (page(1, "c"), "block 'c', which is not in the list"),
        (be(0x18), "flags 0x18"),
        (be(0x01), "flags 0x1"),
        (be(0x30), "flags 0x30"),
        (be(0x0A), "flags 0xa"),
        (be(0x400), "flags 0x400"),
        (be(0x1010), "end mark with address 0x1000"),
        (be(PAGE | 0x04) + cstr8("z") + be(PAGE), "a second block list"),
        (be(0x40) + cstr8("a") + b"\2\0\1x", "encoding 2"),
        (be(0x40) + cstr8("a") + b"\1\0\0x", "XBZRLE page of 0 bytes"),
        (be(0x40) + cstr8("a") + b"\1\x10\1x", "XBZRLE page of 4097 bytes"),
        (be(0x100) + cstr8("a") + be(PAGE + 15, 4), "compressed page of 4111 bytes"),
    ],
)
def test_corrupt_records(body: bytes, message: str) -> None:
    with pytest.raises(StreamCorrupt, match=message) as caught:
        decode(START + body, eof=False)
    assert caught.value.section == "ram"
    assert caught.value.position is not None


def test_the_error_stands_at_the_record_and_names_the_block() -> None:
    good = zero(0, "b") + b"".join(map(zero, range(1, 64)))
    with pytest.raises(StreamCorrupt) as caught:
        decode(START + good + zero(64) * 40, eof=False)
    assert caught.value.position == len(START + good)
    assert caught.value.block == "b"


def test_rdma_is_unsupported() -> None:
    with pytest.raises(StreamUnsupported, match="RDMA"):
        decode(START + be(0x80), eof=False)


def listed(*entries: tuple[str, int], total: int | None = None) -> bytes:
    sizes = sum(size for _, size in entries) if total is None else total
    head = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04"
    return HEAD + head + be(sizes | 4) + b"".join(cstr8(n) + be(s) for n, s in entries) + EOS


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_block_list(piece: int) -> None:
    records = decode(listed(("pc.ram", 16 * PAGE), ("bios", PAGE)), piece=piece, eof=False)
    entries = (RamBlockEntry("pc.ram", 16 * PAGE), RamBlockEntry("bios", PAGE))
    assert records[2:] == [
        SectionHeader(1, 1, "ram", 0, 4),
        RamBlockList(17 * PAGE, entries),
        RamEos(),
    ]
    assert encode_block_list(entries) + encode_eos() in listed(
        ("pc.ram", 16 * PAGE), ("bios", PAGE)
    )


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (listed(("a", PAGE), ("a", PAGE)), StreamCorrupt, "listed twice"),
        (listed(("a", 2 * PAGE), total=PAGE), StreamCorrupt, "exceed the total"),
        (listed(("a", 0), total=PAGE), StreamCorrupt, "of 0x0 bytes"),
        (listed(("a", 100), total=PAGE), StreamCorrupt, "of 0x64 bytes"),
        (listed(("", PAGE)), StreamCorrupt, "name b''"),
        (listed(("a\nb", PAGE)), StreamCorrupt, "name"),
        (listed(*((f"b{i}", PAGE) for i in range(4097))), StreamLimit, "more than 4096"),
        (listed(("a", 2 << 30)), StreamLimit, "the limit is 1073741824"),
    ],
)
def test_bad_block_lists(stream: bytes, error: type[StreamError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(stream, limits=StreamLimits(ram_bytes=1 << 30), eof=False)


def test_addresses_of_shared_blocks() -> None:
    head = HEAD + b"\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0fx-ignore-shared"
    start = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04"
    body = be(PAGE | 4) + cstr8("a") + be(PAGE) + be(0xFFFF0000) + EOS
    records = decode(head + start + body, eof=False)
    entry = RamBlockEntry("a", PAGE, address=0xFFFF0000)
    assert records[-2] == RamBlockList(PAGE, (entry,))
    assert encode_block_list((entry,)) + EOS == body


def test_a_larger_target_page() -> None:
    head = HEAD + b"\x05\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x10"
    size = 1 << 16
    start = (
        b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04" + be(4 * size | 4) + cstr8("a") + be(4 * size)
    )
    rows = np.hstack((page_headers(np.array([1, 2, 3]), size), np.ones((3, size), np.uint8)))
    body = encode_named_header(0, size, "a", is_zero=True) + b"\0" + rows.tobytes()
    stream = head + start + body + zero_records(np.array([1]), size).tobytes() + EOS
    decoder, encoder = StreamDecoder(), StreamEncoder()
    decoder.feed(stream)
    encoded = b""
    while (record := decoder.next_record()) is not None:
        encoded += encoder.encode(record)
    assert decoder.page_size == size
    assert encoded == stream


def test_version_and_place_of_the_section() -> None:
    with pytest.raises(StreamUnsupported, match="version 3, only 4"):
        decode(HEAD + b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x03", eof=False)
    again = b"\x01\0\0\0\x09\x03ram\0\0\0\0\0\0\0\x04"
    with pytest.raises(StreamCorrupt, match="duplicate section"):
        decode(HEAD + ram_start({"a": 1}) + again, eof=False)
    with pytest.raises(StreamCorrupt, match="the footer names section 2"):
        decode(START + EOS + b"\x7e\0\0\0\2", eof=False)
    with pytest.raises(StreamCorrupt, match="footer is missing"):
        decode(START + EOS + b"\x04\0\0\0\2", eof=False)

"""The head of a stream, commands, packages, live sections, and the decoder's input."""

import pytest

from migrationd.codec.buffer import MINIMUM_FREE_BYTES, NeedData, ReadBuffer
from migrationd.codec.command import encode_command
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.records import (
    Command,
    Configuration,
    EndOfStream,
    FileHeader,
    OpaqueSection,
    Package,
    PageBatch,
    RamBlockEntry,
    RamBlockList,
    SectionHeader,
)
from migrationd.codec.stream import StreamDecoder, StreamLimits
from migrationd.codec.vmdescription import DeviceSize, device_sizes
from migrationd.errors import (
    InvalidState,
    StreamCorrupt,
    StreamError,
    StreamLimit,
    StreamTruncated,
    StreamUnsupported,
)
from tests.unit.codec.support import (
    END,
    FOOTER,
    HEAD,
    PAGE,
    PART,
    be,
    cstr8,
    decode,
    devices,
    drain,
    full,
    ram_start,
    vmdescription,
)

QEVM = b"QEVM\0\0\0\3"


def subsection(name: str, body: bytes, version: int = 1) -> bytes:
    return b"\x05" + cstr8(f"configuration/{name}") + be(version, 4) + body


def configuration(*subsections: bytes, machine: bytes = b"pc-q35-10.0") -> bytes:
    return QEVM + b"\x07" + be(len(machine), 4) + machine + b"".join(subsections)


@pytest.mark.parametrize("piece", [1, 1000])
def test_configuration(piece: int) -> None:
    stream = configuration(
        subsection("target-page-bits", be(12, 4)),
        subsection("capabilities", be(2, 4) + cstr8("x-ignore-shared") + cstr8("other")),
        subsection("uuid", bytes(range(16))),
    )
    records = decode(stream + b"\0", piece=piece, idle=True)
    assert records == [
        FileHeader(3),
        Configuration("pc-q35-10.0", 12, ("x-ignore-shared", "other"), bytes(range(16))),
        EndOfStream(),
    ]
    assert b"".join(map(StreamEncoder().encode, records)) == stream + b"\0"


def test_no_configuration() -> None:
    assert decode(QEVM + b"\0") == [FileHeader(3), EndOfStream()]


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (b"QEVN\0\0\0\3", StreamCorrupt, "Not a migration stream: it begins with 0x5145564e"),
        (b"QEVM\0\0\0\2", StreamUnsupported, "stream version 2"),
        (QEVM + b"\x07\0\0\4\1", StreamCorrupt, "name of 1025 bytes"),
        (configuration(subsection("uuid", bytes(16), 2)), StreamCorrupt, "version 2"),
        (configuration(subsection("target-page-bits", be(9, 4))), StreamCorrupt, "page bits 9"),
        (configuration(subsection("capabilities", be(65, 4))), StreamCorrupt, "65 capabilities"),
        (configuration(subsection("new", b"")), StreamUnsupported, "configuration/new"),
        (configuration() + b"\x07", StreamCorrupt, "unknown element type 0x07"),
        (configuration() + b"\x06", StreamCorrupt, "unknown element type 0x06"),
        (configuration() + b"\x08\0\x0c\0\0", StreamCorrupt, "unknown command 12"),
        (configuration() + b"\x08\0\0\0\0", StreamCorrupt, "unknown command 0"),
        (configuration() + b"\x08\0\x02\0\x05", StreamCorrupt, "a payload of 5 bytes"),
        (configuration() + b"\x02\0\0\0\7", StreamCorrupt, "section id 7 was never started"),
        (configuration() + b"\x04\0\0\0\7\0" + bytes(8), StreamCorrupt, "section name b''"),
        (configuration() + b"\x04\0\0\0\7\1\n" + bytes(8), StreamCorrupt, "section name"),
        (b"", StreamTruncated, "ended before"),
        (b"QEV", StreamTruncated, "ended before"),
        (configuration(), StreamTruncated, "ended before"),
    ],
)
def test_bad_heads(stream: bytes, error: type[StreamError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(stream + (b"" if error is StreamTruncated else b"\0"))


def test_ids_stand_for_one_section() -> None:
    with pytest.raises(StreamCorrupt, match="duplicate section id 1"):
        decode(HEAD + ram_start({"a": 1}) + live(1, 1, "block", be(2)))
    with pytest.raises(StreamCorrupt, match="section id 5 was never started"):
        # A FULL section has no parts.
        decode(HEAD + full(5, "dev", b"x") + encode_command(Command(11, b"")) + b"\x02\0\0\0\5")


def test_parts_bear_the_name_of_their_start() -> None:
    stream = HEAD + ram_start({"a": 1}) + PART + be(0x10) + FOOTER + END + FOOTER
    heads = [r for r in decode(stream, eof=False) if isinstance(r, SectionHeader)]
    assert [(head.kind, head.idstr, head.version_id) for head in heads] == [
        (1, "ram", 4),
        (2, "ram", 4),
        (3, "ram", 4),
    ]


def test_commands() -> None:
    commands = [
        Command(1, b""),
        Command(2, be(7, 4)),
        Command(3, be(4096) + be(4096)),
        Command(6, b"\0" + cstr8("a") + b"\0" + bytes(16)),
        Command(8, b""),
        Command(10, cstr8("pc.ram")),
        Command(11, b""),
    ]
    stream = HEAD + b"".join(map(encode_command, commands))
    assert decode(stream, piece=1, eof=False)[2:] == commands


HUGE = 2 << 20


def advised(summary: int, *entries: bytes, total: int) -> bytes:
    """A head with ADVISE, and a START of ``ram`` of these block entries."""
    advise = encode_command(Command(3, be(summary) + be(4096)))
    start = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04"
    return HEAD + advise + start + be(total | 4) + b"".join(entries) + be(0x10) + FOOTER


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("huge_first", [True, False])
def test_blocks_name_their_page_size_where_it_is_not_the_normal_one(
    huge_first: bool, piece: int
) -> None:
    huge = cstr8("ram0") + be(HUGE) + be(HUGE)
    plain = cstr8("rom") + be(PAGE)
    entries = (huge, plain) if huge_first else (plain, huge)
    stream = advised(0x201000, *entries, total=HUGE + PAGE)
    blocks = next(
        record
        for record in decode(stream, piece=piece, eof=False)
        if isinstance(record, RamBlockList)
    ).blocks
    found = {block.idstr: (block.used_length, block.page_size) for block in blocks}
    assert found == {"ram0": (HUGE, HUGE), "rom": (PAGE, None)}


def test_no_block_names_a_page_size_where_all_are_normal() -> None:
    stream = advised(0x1000, cstr8("ram0") + be(HUGE), total=HUGE)
    (blocks,) = [r for r in decode(stream, eof=False) if isinstance(r, RamBlockList)]
    assert blocks.blocks == (RamBlockEntry("ram0", HUGE),)


def test_a_block_of_a_part_of_a_huge_page() -> None:
    with pytest.raises(StreamCorrupt, match="pages of 0x200000"):
        decode(advised(0x201000, cstr8("r") + be(PAGE) + be(HUGE), total=PAGE), eof=False)


def test_a_resumed_stream_knows_sections_and_blocks_and_forgets_the_last_block() -> None:
    turned = (
        HEAD + ram_start({"a": 4, "b": 4}) + packaged(encode_command(LISTEN), encode_command(RUN))
    )
    first = StreamDecoder()
    first.feed(turned + PART + be(0x8) + cstr8("a") + b"x" * 100)
    while first.next_record() is not None:
        pass
    again = first.resumed()
    page = be(0x1008) + cstr8("b") + bytes(PAGE)
    again.feed(encode_command(Command(9, b"")) + PART + page + be(0x10) + FOOTER)
    records = []
    while (record := again.next_record()) is not None:
        records.append(record)
    assert records[0] == Command(9, b"")
    assert isinstance(records[1], SectionHeader)
    assert records[1].idstr == "ram"
    assert isinstance(records[2], PageBatch)
    assert records[2].block == 1
    other = first.resumed()
    other.feed(PART + be(0x1028) + bytes(PAGE))
    other.next_record()
    with pytest.raises(StreamCorrupt, match="CONTINUE before any block"):
        other.next_record()


def test_only_postcopy_is_resumed() -> None:
    decoder = StreamDecoder()
    decoder.feed(HEAD + ram_start({"a": 1}))
    while decoder.next_record() is not None:
        pass
    with pytest.raises(InvalidState):
        decoder.resumed()


LISTEN, RUN = Command(4, b""), Command(5, b"")


def packaged(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return encode_command(Command(7, be(len(body), 4))) + body


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_package(piece: int) -> None:
    sections = full(2, "cpu", b"\x7e\0\0\0\2z") + full(3, "timer", b"12")
    body = [encode_command(LISTEN), sections, encode_command(RUN)]
    stream = HEAD + ram_start({"a": 1}) + packaged(*body) + END + FOOTER + b"\0"
    records = decode(stream, piece=piece, eof=False)
    assert b"".join(map(StreamEncoder().encode, records)) == stream
    package = next(record for record in records if isinstance(record, Package))
    assert package.records[0] == LISTEN
    assert package.records[-1] == RUN
    assert devices(package.records) == [("cpu", 0, b"\x7e\0\0\0\2z"), ("timer", 0, b"12")]
    # Postcopy has no description: the EOF byte alone is the end.
    assert isinstance(records[-1], EndOfStream)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"", StreamCorrupt, "does not end with RUN"),
        (encode_command(LISTEN), StreamCorrupt, "does not end with RUN"),
        (b"\0", StreamCorrupt, "element type 0x00 in a package"),
        (ram_start({"a": 1}), StreamCorrupt, "element type 0x01 in a package"),
        (packaged(encode_command(RUN)), StreamCorrupt, "a package in a package"),
        (b"\x08\0\x05\0", StreamTruncated, "ends early"),
        (b"\x04\0\0\0\2\3cpu\0\0\0\0\0\0\0\1body", StreamTruncated, "inside a section"),
    ],
)
def test_bad_packages(body: bytes, error: type[StreamError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(HEAD + packaged(body), eof=False)


def test_too_many_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrationd.codec.opaque.SECTION_LIMIT", 3)
    monkeypatch.setattr("migrationd.codec.section.SECTION_LIMIT", 3)
    with pytest.raises(StreamLimit, match="more than 3 device sections"):
        decode(HEAD + b"".join(full(n, "d", b"", n) for n in range(4)) + b"\0")
    with pytest.raises(StreamLimit, match="more than 3 sections"):
        decode(HEAD + b"".join(live(1, n, "block", be(2)) for n in range(4)))


def test_package_limit() -> None:
    with pytest.raises(StreamLimit, match="a package of 101 bytes"):
        decode(HEAD + packaged(bytes(101)), limits=StreamLimits(package_bytes=100), eof=False)


def live(kind: int, number: int, idstr: str, body: bytes, *, footer: bool = True) -> bytes:
    head = bytes([kind]) + be(number, 4)
    if kind == 1:
        head += cstr8(idstr) + be(0, 4) + be(1, 4)
    return head + body + (b"\x7e" + be(number, 4) if footer else b"")


BITMAP_START = b"\x1c\2n0\3bm1\0\0\x10\0\1" + b"\x14\3bm0\0\1\0\0\1" + b"\1"
BITMAP_END = (
    b"\x4c\2n0\3bm1" + be(0) + be(8, 4) + be(5) + b"\x7e\0\0\0\x05"
    + b"\x42" + be(8) + be(8, 4) + b"\x20" + b"\1"
)  # fmt: skip
BLOCK_PART = (
    be(0x201) + cstr8("d0") + (b"\x7e\0\0\0\x05\x04\0\0\0\x06\1a" + bytes(8)) * 100
    + bytes((1 << 20) - 2000) + be(0x409) + cstr8("d0") + be(50 << 9 | 4) + be(2)
)  # fmt: skip


@pytest.mark.parametrize("footer", [True, False])
@pytest.mark.parametrize("piece", [1 << 12, 1 << 22])
@pytest.mark.parametrize(
    ("idstr", "bodies"),
    [
        ("dirty-bitmap", [BITMAP_START, b"\1", BITMAP_END]),
        ("block", [be(2), BLOCK_PART, be(2)]),
        ("block", [be(2), be(2), be(2)]),
    ],
)
def test_live_sections_delimit_themselves(
    idstr: str, bodies: list[bytes], piece: int, footer: bool
) -> None:
    stream = HEAD + ram_start({"a": 1}, footer=footer)
    stream += b"".join(
        live(kind, 5, idstr, body, footer=footer)
        for kind, body in zip((1, 2, 3), bodies, strict=True)
    )
    found = decode(stream, piece=piece, eof=False)
    assert [r.body for r in found if isinstance(r, OpaqueSection)] == bodies
    assert {r.has_footer for r in found if isinstance(r, OpaqueSection)} == {footer}


def test_other_live_sections_end_at_the_first_plausible_footer() -> None:
    stream = HEAD + ram_start({"a": 1}) + live(1, 5, "0000:00:05.0/vfio", b"\x7e\0\0\0\5??")
    stream += live(2, 5, "", b"part") + live(3, 5, "", b"end") + END + FOOTER
    found = decode(stream, eof=False)
    bodies = [r.body for r in found if isinstance(r, OpaqueSection)]
    assert bodies == [b"\x7e\0\0\0\5??", b"part", b"end"]


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (live(1, 5, "dirty-bitmap", b"\x81\1"), StreamCorrupt, "unknown chunk flags 0x8101"),
        (live(1, 5, "dirty-bitmap", b"\x81\x80\0\1"), StreamCorrupt, "flags 0x81800001"),
        (
            live(1, 5, "dirty-bitmap", b"\x40" + bytes(12) + be(1 << 40)),
            StreamCorrupt,
            "a chunk of 1099511627776 bytes",
        ),
        (live(1, 5, "block", be(0x10)), StreamCorrupt, "unknown record flags 0x10"),
        (live(1, 5, "block", be(2), footer=False) + b"\x7e\0\0\0\6", StreamCorrupt, "footer is"),
        (live(1, 5, "block", be(4) * 20), StreamLimit, "within 100 bytes"),
    ],
)
def test_bad_live_sections(stream: bytes, error: type[StreamError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode(
            HEAD + ram_start({"a": 1}) + stream, limits=StreamLimits(section_bytes=100), eof=False
        )


def test_an_unknown_live_section_without_footers_is_unsupported() -> None:
    stream = HEAD + ram_start({"a": 1}, footer=False) + live(1, 5, "vfio", b"x", footer=False)
    with pytest.raises(StreamUnsupported, match="nothing tells where the section ends"):
        decode(stream, eof=False)


def test_mapped_ram_is_unsupported() -> None:
    stream = configuration(subsection("capabilities", be(1, 4) + cstr8("mapped-ram")))
    with pytest.raises(StreamUnsupported, match="mapped-ram"):
        decode(stream + ram_start({"a": 1}), eof=False)


def test_nothing_behind_the_end_is_looked_at_or_kept() -> None:
    stream = HEAD + vmdescription([])
    decoder = StreamDecoder(buffer_bytes=1)
    decoder.feed(stream + b"junk")
    drain(decoder, [])
    assert decoder.finished
    assert decoder.position == len(stream)
    for _ in range(100):
        view = decoder.receive_view()
        decoder.received(len(view))
    assert len(decoder.receive_view()) == len(view)
    assert decoder.next_record() is None
    assert decoder.position == len(stream)


def test_description_limits() -> None:
    with pytest.raises(StreamLimit, match="a VMDESCRIPTION of 101 bytes"):
        decode(HEAD + b"\0\6" + be(101, 4) + b"{", limits=StreamLimits(description_bytes=100))
    with pytest.raises(StreamTruncated):
        decode(HEAD + b"\0\6" + be(10, 4) + b"{")


def test_device_sizes() -> None:
    text = b"""{"configuration": {}, "page_size": 4096, "devices": [
        {"name": "old", "instance_id": 1, "size": 7, "fields": [{"name": "data", "size": 7}]},
        {"name": "new", "instance_id": 0, "vmsd_name": "new", "version": 1,
         "fields": [{"name": "a", "size": 4}, {"name": "b", "array_len": 3, "size": 8,
                     "struct": {"fields": [{"name": "c", "size": 8}]}}],
         "subsections": [{"vmsd_name": "new/x", "version": 1, "fields": [{"name": "d", "size": 2}],
                          "subsections": [{"vmsd_name": "n", "fields": []}]}]}]}"""
    assert device_sizes(text) == [
        DeviceSize("old", 1, 7),
        DeviceSize("new", 0, 28 + 6 + 5 + 2 + 6 + 1),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b"\xff",
        b'{"devices": {}}',
        b'{"devices": [1]}',
        b'{"devices": [{"name": "a"}]}',
        b'{"devices": [{"name": "a", "instance_id": -1}]}',
        b'{"devices": [{"name": "", "instance_id": 1}]}',
        b'{"devices": [{"name": "\\u00e9", "instance_id": 1}]}',
        b'{"devices": [{"name": "a", "instance_id": 1, "fields": [{"size": "1"}]}]}',
        b'{"devices": ' + b"[" * 100_000,
    ],
)
def test_bad_descriptions(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        device_sizes(text)


def test_read_buffer() -> None:
    buffer = ReadBuffer(1, 1 << 20, position=100)
    view = buffer.free_view()
    assert len(view) >= MINIMUM_FREE_BYTES
    view[:4] = b"\1\2\3\4"
    buffer.added(4)
    assert buffer.uint(2) == 0x0102
    assert buffer.peek(2, 2) == b"\3\4"
    with pytest.raises(NeedData):
        buffer.peek(3, 2)
    buffer.skip(3)
    assert (buffer.position, len(buffer)) == (103, 1)
    buffer.feed(bytes(500_000))
    assert (buffer.position, len(buffer)) == (103, 500_001)
    assert buffer.peek(2) == b"\4\0"
    with pytest.raises(StreamLimit):
        buffer.feed(bytes(3 << 20))
    buffer.skip(len(buffer))
    assert len(buffer.free_view()) == 2 * MINIMUM_FREE_BYTES

"""Urgent pages in any pieces, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.codec.records import RamBlockEntry
from migrationd.codec.urgent import UrgentDecoder
from migrationd.errors import StreamCorrupt, StreamTruncated

PAGE = 4096
BLOCKS = (RamBlockEntry("heap", 64 * PAGE), RamBlockEntry("x" * 255, 2 * PAGE))
NAMES = [bytes([len(block.idstr)]) + block.idstr.encode() for block in BLOCKS]
EOS = (0x10).to_bytes(8, "big")


def record(block: int, page: int, *, named: bool = True, zero: bool = False) -> bytes:
    """A page that holds its number all over, or a zero page."""
    word = page * PAGE | (0x02 if zero else 0x08) | (0 if named else 0x20)
    head = word.to_bytes(8, "big") + (NAMES[block] if named else b"")
    return head + (b"\0" if zero else bytes([page + 1]) * PAGE)


def decode(data: bytes, sizes: list[int]) -> tuple[UrgentDecoder, list[tuple[int, int, int]]]:
    """Block, page and content byte of what comes, received in pieces of these sizes."""
    decoder = UrgentDecoder(BLOCKS, PAGE)
    found = []
    at, turn = 0, 0
    while at < len(data):
        view = decoder.free_view()
        piece = data[at : at + min(len(view), sizes[turn % len(sizes)])]
        turn += 1
        view[: len(piece)] = piece
        at += len(piece)
        for page in decoder.received(len(piece)):
            content = decoder.buffer[page.at : page.at + PAGE] if page.at >= 0 else bytes(PAGE)
            assert content == content[:1] * PAGE
            found.append((page.block, page.page, content[0]))
        decoder.done()
    return decoder, found


PAGES = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.booleans(), st.booleans()), max_size=40
)


@given(pages=PAGES, sizes=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=8))
def test_any_pages_in_any_pieces(
    pages: list[tuple[int, int, bool, bool]], sizes: list[int]
) -> None:
    data, expected, last = b"", [], None
    for block, page, named, zero in pages:
        data += record(block, page, named=named or block != last, zero=zero)
        expected.append((block, page, 0 if zero else page + 1))
        last = block
    decoder, found = decode(data + EOS, sizes)
    assert found == expected
    assert decoder.is_ended
    decoder.ended()
    assert decoder.position == len(data) + len(EOS)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (record(0, 1, named=False), "CONTINUE before"),
        (record(0, 64), "outside the block"),
        (record(0, 1).replace(b"\x04heap", b"\x04hoop"), "'hoop', which is not"),
        ((0x40 | PAGE).to_bytes(8, "big") + NAMES[0], "no page"),
        ((0x0A).to_bytes(8, "big") + NAMES[0], "no page"),
        ((PAGE | 0x10).to_bytes(8, "big"), "no page"),
        (record(0, 1, zero=True)[:-1] + b"\7", "byte 0x07"),
        ((-PAGE & (1 << 64) - 1 | 8).to_bytes(8, "big") + NAMES[0], "outside the block"),
    ],
)
def test_what_is_no_page(data: bytes, text: str) -> None:
    with pytest.raises(StreamCorrupt, match=text) as caught:
        decode(data, [len(data)])
    assert caught.value.position == 0


@given(cut=st.integers(1, len(record(0, 1)) - 1))
def test_an_end_inside_a_page(cut: int) -> None:
    decoder, found = decode(record(0, 1)[:cut], [PAGE])
    assert not found
    with pytest.raises(StreamTruncated):
        decoder.ended()


@given(data=st.binary(max_size=3 * PAGE))
def test_anything_is_pages_or_a_typed_error(data: bytes) -> None:
    try:
        decode(data, [len(data) or 1])
    except StreamCorrupt:
        return

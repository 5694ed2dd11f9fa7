"""XBZRLE edits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.pageops.xbzrle import decode_page, decode_pages
from migrationd.pageops.xbzrle_encode import encode_pages


def all_at_once(edits: list[bytes], pages: np.ndarray) -> None:
    data = np.frombuffer(b"".join(edits), np.uint8)
    ends = np.cumsum([len(edit) for edit in edits])
    decode_pages(data, ends - [len(edit) for edit in edits], ends, pages)


def applied(edit: str, page: bytes = bytes(4096)) -> bytes:
    out = bytearray(page)
    decode_page(bytes.fromhex(edit), out)
    return bytes(out)


def test_skips_and_replaces() -> None:
    page = applied("64 03 aabbcc 8107 01 01")
    assert page[100:103] == b"\xaa\xbb\xcc"
    assert page[1000] == 1
    assert sum(page) == 0xAA + 0xBB + 0xCC + 1


def test_the_rest_stays() -> None:
    assert applied("00 02 3031", b"abcd") == b"01cd"
    assert applied("02 02 3031", b"abcd") == b"ab01"


@pytest.mark.parametrize(
    "edit",
    [
        "05",  # a pair has two halves
        "80",  # a count of two bytes has two
        "8080 01 00",  # the second byte of a count is small
        "01 00",  # nothing replaced
        "01 01 aa 00 01 bb",  # only the first skip may be 0
        "04 01 aa",  # behind the page
        "03 02 aabb",  # past its end
        "00 03 aabb",  # past the record's end
        "ff7f 01 aa",  # 16383
    ],
)
def test_malformed(edit: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        applied(edit, b"abcd")
    good = bytes.fromhex("00 01 31")
    pages = np.frombuffer(b"abcd" * 3, np.uint8).reshape(3, 4).copy()
    with pytest.raises(ValueError, match=r"."):
        all_at_once([good, bytes.fromhex(edit), good], pages)
    assert pages.tobytes() == b"abcd" * 3


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_many_at_once_are_what_each_is_alone(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    old = random.integers(0, 256, (count, 4096), np.uint8)
    new = old.copy()
    for row in new:
        for begin in random.integers(0, 4096, random.integers(0, 30)):
            row[begin : begin + random.integers(1, 400)] ^= 0x3C
    encoded = encode_pages(old, new)
    edits = [encoded.edit(index) for index in range(count)]
    pages = old.copy()
    all_at_once(edits, pages)
    expected = np.where(encoded.is_encoded[:, None], new, old)
    assert (pages == expected).all()

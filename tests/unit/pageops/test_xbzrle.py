"""XBZRLE edits."""

import pytest

from migrationd.pageops.xbzrle import decode_page


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

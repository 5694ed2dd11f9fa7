import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.pageops.xbzrle import decode_page
from migrationd.pageops.xbzrle_encode import encode_pages

PAGE = 4096


def plain_edit(old: bytes, new: bytes) -> bytes | None:
    """The same encoding, byte by byte."""
    runs: list[list[int]] = []
    for at in (at for at in range(len(new)) if old[at] != new[at]):
        if runs and at - runs[-1][1] <= 2:
            runs[-1][1] = at + 1
        else:
            runs.append([at, at + 1])
    edit, end = b"", 0
    for begin, stop in runs:
        for number in (begin - end, stop - begin):
            edit += bytes((number,)) if number < 128 else bytes((number & 127 | 128, number >> 7))
        edit += new[begin:stop]
        end = stop
    return edit if len(edit) < len(new) else None


def check(old: np.ndarray, new: np.ndarray) -> None:
    encoded = encode_pages(old, new)
    for index in range(len(new)):
        before, after = old[index].tobytes(), new[index].tobytes()
        assert encoded.is_changed[index] == (before != after)
        if not encoded.is_encoded[index]:
            assert encoded.edit(index) == b""
            continue
        edit = encoded.edit(index)
        assert edit == plain_edit(before, after)
        page = bytearray(before)
        decode_page(edit, page)
        assert page == after


def test_the_worked_example() -> None:
    old = np.zeros((1, PAGE), np.uint8)
    new = old.copy()
    new[0, 100:103] = (0xAA, 0xBB, 0xCC)
    new[0, 1000] = 1
    assert encode_pages(old, new).edit(0).hex() == "6403aabbcc81070101"


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, PAGE - 1), st.integers(1, 600)), max_size=12),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**32),
)
def test_any_change_decodes_to_the_new_page(
    changes: list[list[tuple[int, int]]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    old = generator.integers(0, 256, (len(changes), PAGE), np.uint8)
    new = old.copy()
    for index, runs in enumerate(changes):
        for begin, size in runs:
            part = new[index, begin : begin + size]
            part[:] = generator.integers(0, 256, len(part), np.uint8)
    check(old, new)


def test_what_is_longer_than_a_page_has_no_edit() -> None:
    old = np.zeros((3, PAGE), np.uint8)
    new = old.copy()
    new[0] = 1
    new[1, ::4] = 1
    new[2, 5] = 1
    encoded = encode_pages(old, new)
    assert encoded.is_changed.tolist() == [True, True, True]
    assert encoded.is_encoded.tolist() == [False, False, True]
    check(old, new)


def test_first_and_last_byte_of_neighbouring_pages() -> None:
    old = np.zeros((3, PAGE), np.uint8)
    new = old.copy()
    new[0, -1] = new[1, 0] = new[1, -1] = new[2, 0] = 9
    check(old, new)


def test_odd_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="pages of one size"):
        encode_pages(np.zeros((1, 12), np.uint8), np.zeros((1, 12), np.uint8))

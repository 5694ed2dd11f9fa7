"""Rows of FULL sections, cut by names and sizes."""

import time

import pytest

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.reframe import DescriptionFinder, cut, described, find_description_at_end
from migrationd.codec.vmdescription import DeviceSize
from tests.unit.codec.support import devices, full, vmdescription


def size(idstr: str, length: int, instance: int = 0) -> DeviceSize:
    return DeviceSize(idstr, instance, length)


@pytest.mark.parametrize("footer", [True, False])
def test_sizes_and_names(footer: bool) -> None:
    raw = full(1, "a", b"12", footer=footer) + full(2, "a", b"", 1, footer=footer)
    expected = [("a", 0, b"12"), ("a", 1, b"")]
    for first in (2, 0, 90):
        found = cut(raw, [size("a", first), size("a", 0, 1)], has_footers=footer)
        assert found is not None
        assert devices(found) == expected
        assert {section.has_footer for section in found} == {footer}
        assert [section.section_id for section in found] == [1, 2]


@pytest.mark.parametrize("footer", [True, False])
def test_other_devices_do_not_fit(footer: bool) -> None:
    raw = full(1, "a", b"12", footer=footer) + full(2, "b", b"3", footer=footer)
    assert cut(raw, [size("b", 2)], has_footers=footer) is None
    assert cut(raw, [size("a", 2), size("c", 1)], has_footers=footer) is None
    assert cut(raw, [], has_footers=footer) is None
    assert cut(raw[:10], [size("a", 2), size("b", 1)], has_footers=footer) is None


def test_a_missing_footer_does_not_fit() -> None:
    raw = full(1, "a", b"12") + full(2, "b", b"3")
    assert cut(raw[:-1] + b"\3", [size("a", 2), size("b", 1)], has_footers=True) is None


def test_the_search_goes_back() -> None:
    # The described size of the first section leads into a dead end.
    decoy = full(2, "b", b"", footer=False)
    raw = full(1, "a", b"1" + decoy + b"2", footer=False) + full(2, "b", b"", footer=False)
    raw += full(3, "c", b"", footer=False)
    found = cut(raw, [size("a", 1), size("b", 0), size("c", 0)], has_footers=False)
    assert found is not None
    # Names alone cannot tell the two apart; either way nothing is lost.
    assert [section.idstr for section in found] == ["a", "b", "c"]
    exact = [size("a", 2 + len(decoy)), size("b", 0), size("c", 0)]
    found = cut(raw, exact, has_footers=False)
    assert found is not None
    assert devices(found)[0] == ("a", 0, b"1" + decoy + b"2")


def test_a_hostile_row_is_given_up() -> None:
    raw = b"".join(full(1, "a", b"", footer=False) for _ in range(20_000))
    expected = [size("a", 1)] * 19_000 + [size("z", 0)]
    begin = time.process_time()
    assert cut(raw, expected, has_footers=False) is None
    assert time.process_time() - begin < 10


def test_find_description() -> None:
    end = vmdescription([("a", 0, 5)])
    buffer = ReadBuffer(1, 1 << 20)
    finder = DescriptionFinder(0, 1000)
    found = []
    for byte in b"\0\6\0\0\0\x09{xxxxxxx}" + b"\0\6\0\0\xff\xff{}" + end:
        buffer.feed(bytes([byte]))
        found += [(at, described(text)) for at, text in finder.find(buffer)]
    assert found == [(0, []), (23, [size("a", 5)])]
    assert [at for at, _ in find_description_at_end(buffer, 1000)] == [23]
    assert list(find_description_at_end(buffer, 10)) == []

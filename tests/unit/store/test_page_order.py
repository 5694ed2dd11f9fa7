"""The learned order beside a guest at rest."""

from pathlib import Path

import numpy as np
import pytest

from migrationd.store.page_order import read_order, write_order

BLOCKS = [("pc.ram", 1 << 20), ("vga", 4096)]
ORDER = np.array([[0, 77], [1, 4095], [0, (1 << 20) - 1], [0, 0]], np.int64)


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "g.order"
    write_order(path, BLOCKS, ORDER)
    found = read_order(path, BLOCKS)
    assert found is not None
    assert np.array_equal(found, ORDER)
    assert [item.name for item in tmp_path.iterdir()] == ["g.order"]


def test_another_guest_has_none(tmp_path: Path) -> None:
    path = tmp_path / "g.order"
    write_order(path, BLOCKS, ORDER)
    assert read_order(path, [("pc.ram", 1 << 20)]) is None
    assert read_order(path, [("pc.ram", 1 << 19), ("vga", 4096)]) is None
    assert read_order(tmp_path / "other", BLOCKS) is None


@pytest.mark.parametrize("at", [0, 9, 13, 17, 25, -1])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, at: int) -> None:
    path = tmp_path / "g.order"
    write_order(path, BLOCKS, ORDER)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    assert read_order(path, BLOCKS) is None
    path.write_bytes(raw[: len(raw) // 2])
    assert read_order(path, BLOCKS) is None


def test_pages_that_the_guest_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "g.order"
    for page in ([0, 1 << 20], [2, 0]):
        write_order(path, BLOCKS, np.array([page], np.int64))
        assert read_order(path, BLOCKS) is None

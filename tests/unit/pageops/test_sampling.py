"""Digests of pages change with any byte of them."""

import numpy as np

from migrationd.pageops.sampling import page_digests

PAGE = 4096


def test_each_byte_counts_and_no_other_page() -> None:
    memory = np.random.default_rng(1).integers(0, 256, 64 * PAGE, dtype=np.uint8)
    pages = np.arange(64)
    before = page_digests(memory, PAGE, pages)
    assert len(set(before.tolist())) == 64
    for position in (0, 7, 8, PAGE - 1):
        memory[5 * PAGE + position] ^= 0x80
        after = page_digests(memory, PAGE, pages)
        assert np.flatnonzero(after != before).tolist() == [5]
        before = after


def test_words_that_change_places_count() -> None:
    memory = np.zeros(PAGE, np.uint8)
    memory[0] = 1
    first = page_digests(memory, PAGE, np.array([0]))
    memory[0], memory[8] = 0, 1
    assert page_digests(memory, PAGE, np.array([0])) != first


def test_many_pages_and_none() -> None:
    memory = np.zeros(10_000 * PAGE, np.uint8)
    assert len(page_digests(memory, PAGE, np.arange(10_000))) == 10_000
    assert len(page_digests(memory, PAGE, np.empty(0, np.int64))) == 0

"""What is kept of sent pages, and for how long."""

import numpy as np

from migrationd.pageops.xbzrle import decode_page
from migrationd.pageops.xbzrle_cache import LIFETIME_ROUNDS, XbzrleCache

PAGE = 4096


def pages(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8)[:, None], PAGE, axis=1)


def test_a_destination_that_gets_what_the_cache_says_has_the_same_pages() -> None:
    generator = np.random.default_rng(3)
    guest = generator.integers(0, 256, (64, PAGE), np.uint8)
    there: dict[int, bytearray] = {}
    cache = XbzrleCache(40 * PAGE, PAGE, 64)
    unchanged = 0
    for _ in range(12):
        cache.begin_round()
        keys = np.sort(generator.permutation(64)[:30])
        guest[keys[::2], generator.integers(0, PAGE, 15)] ^= 0x55
        guest[keys[0]] = generator.integers(0, 256, PAGE, np.uint8)
        contents = guest[keys].copy()
        is_kept, encoded = cache.update(keys, contents)
        unchanged += int((~encoded.is_changed).sum())
        kept = iter(range(int(is_kept.sum())))
        for key, page, has_old in zip(keys.tolist(), contents, is_kept.tolist(), strict=True):
            index = next(kept) if has_old else None
            if index is None or (encoded.is_changed[index] and not encoded.is_encoded[index]):
                there[key] = bytearray(page.tobytes())
            elif encoded.is_changed[index]:
                decode_page(encoded.edit(index), there[key])
            assert there[key] == page.tobytes()
        zero = keys[-3:]
        guest[zero] = 0
        cache.set_zero(zero)
        there.update({key: bytearray(PAGE) for key in zero.tolist()})
    counters = cache.counters
    edits = counters.pages - unchanged - counters.overflow
    assert edits > 20
    assert unchanged > 20
    assert counters.cache_miss > 30
    assert counters.overflow > 0
    assert counters.bytes - counters.overflow * PAGE < edits * PAGE // 10


def test_a_page_of_late_keeps_its_place_and_an_old_one_gives_way() -> None:
    cache = XbzrleCache(2 * PAGE, PAGE, 4)
    one, two = np.array([1]), np.array([3])
    cache.begin_round()
    cache.update(one, pages(1))
    for _ in range(LIFETIME_ROUNDS - 1):
        cache.begin_round()
        assert not cache.update(two, pages(3))[0].any()
    assert cache.update(one, pages(1))[0].all(), "it was not driven out"
    for _ in range(LIFETIME_ROUNDS):
        cache.begin_round()
    assert not cache.update(two, pages(3))[0].any()
    assert cache.update(two, pages(3))[0].all()
    assert not cache.update(one, pages(1))[0].any()
    assert cache.counters.pages == 2
    assert cache.counters.bytes == 0, "nothing had changed"


def test_what_only_filled_free_places_gives_way_at_once() -> None:
    cache = XbzrleCache(2 * PAGE, PAGE, 4)
    cache.begin_round()
    cache.fill(np.array([0, 1, 2]), pages(9, 9, 9))
    assert cache.free_pages == 0
    is_kept, encoded = cache.update(np.array([0, 1]), pages(9, 8))
    assert is_kept.all(), "of two pages for one place the first has it"
    assert encoded.is_changed.tolist() == [False, True]
    cache.begin_round()
    cache.begin_round()
    cache.fill(np.array([2]), pages(7))
    cache.update(np.array([0]), pages(9))
    assert cache.update(np.array([0]), pages(9))[0].all()


def test_it_is_not_larger_than_the_guest() -> None:
    cache = XbzrleCache(1 << 60, PAGE, 3)
    assert cache.free_pages == 3
    assert XbzrleCache(1, PAGE, 3).free_pages == 1

"""The order in which a guest asked for its pages is followed next time."""

import numpy as np

from migrationd.outgoing.postcopy_learned import batches, fits, merge
from migrationd.outgoing.postcopy_server import RequestLog


def order(*pages: tuple[int, int]) -> np.ndarray:
    return np.array(pages, np.int64).reshape(-1, 2)


def test_each_page_once_in_the_order_of_its_first_request() -> None:
    known = merge(None, order((0, 5), (1, 2), (0, 5), (0, 1)))
    assert known.tolist() == [[0, 5], [1, 2], [0, 1]]
    assert merge(known, order((1, 9), (1, 2))).tolist() == [[0, 5], [1, 2], [0, 1], [1, 9]]


def test_nothing_was_asked_for() -> None:
    assert merge(None, order()).tolist() == []
    assert fits(order(), [10])


def test_an_order_of_another_guest_does_not_fit() -> None:
    assert fits(order((0, 9), (1, 3)), [10, 4])
    for bad in ((0, 10), (2, 0), (-1, 0), (0, -1)):
        assert not fits(order(bad), [10, 4])


def test_zero_pages_go_first_then_the_others_as_they_were_asked_for() -> None:
    present = [np.array([1, 0, 1, 0, 1], np.bool_), np.array([1, 1], np.bool_)]
    found = list(batches(order((0, 4), (0, 3), (1, 1), (0, 0), (0, 1)), present, [1, 1], 512))
    assert [(b.block, b.pages.tolist(), b.is_zero) for b in found if len(b.pages)] == [
        (0, [1, 3], True),
        (0, [4], False),
        (1, [1], False),
        (0, [0], False),
    ]


def test_huge_pages_are_left_to_the_push() -> None:
    present = [np.ones(1024, np.bool_)]
    assert list(batches(order((0, 0), (0, 512)), present, [512], 512)) == []


def test_pages_that_were_passed_are_in_the_order_before_their_request() -> None:
    log = RequestLog()
    assert log.take().tolist() == []
    log.add(1, 3)
    log.add(0, 9)
    log.add_passed(0, 7, 2, 1)
    log.add(1, 40)
    log.add_passed(1, 43, 3, -1)
    assert log.take().tolist() == [
        [1, 3], [0, 7], [0, 8], [0, 9], [1, 43], [1, 42], [1, 41], [1, 40],
    ]  # fmt: skip

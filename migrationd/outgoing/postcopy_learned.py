"""The order in which a guest asked for its pages, for the next time that it is resumed.

A guest that is resumed again from the same state touches the same pages again, in much the
same order. What it asked for goes first then: zero pages as runs, for they cost 9 bytes each,
then the others in the order of the requests.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.outgoing.postcopy_schedule import Batch, Bools

ORDER_PAGES_MAX = 1 << 20
"""Pages whose order is remembered: 4 GiB of a guest's working set, 8 MiB at rest."""

Order = npt.NDArray[np.int64]
"""Pages in order, shape ``(n, 2)``: index of the block, target page."""

NO_ORDER: Order = np.empty((0, 2), np.int64)

_ZERO_BATCH_PAGES = 4096


def merge(known: Order | None, requests: Order) -> Order:
    """The order of before with what was asked for this time behind it, each page once.

    Args:
        known: Order of before, or None.
        requests: Pages in the order of the requests, some of them more than once.
    """
    rows = requests if known is None else np.concatenate((known, requests))
    packed = rows[:, 0] << 40 | rows[:, 1]
    _, firsts = np.unique(packed, return_index=True)
    order: Order = rows[np.sort(firsts)[:ORDER_PAGES_MAX]]
    return order


def fits(order: Order, page_counts: Sequence[int]) -> bool:
    """Whether an order names pages of these blocks only."""
    if not len(order):
        return True
    if order.min() < 0 or order[:, 0].max() >= len(page_counts):
        return False
    return bool(np.all(order[:, 1] < np.array(page_counts)[order[:, 0]]))


def batches(
    order: Order, present: Sequence[Bools], host_pages: Sequence[int], batch_pages: int
) -> Iterator[Batch]:
    """Batches for the background push, to go before everything else.

    Args:
        order: An order that fits.
        present: For each block one bool per page: it holds something.
        host_pages: For each block the target pages of a host page; only blocks of single
            target pages are replayed, others come whole and soon anyway.
        batch_pages: Most pages of a batch that are not zero pages.
    """
    for block, bools in enumerate(present):
        pages = order[order[:, 0] == block, 1]
        zero = np.sort(pages[~bools[pages]])
        for start in range(0, len(zero), _ZERO_BATCH_PAGES) if host_pages[block] == 1 else ():
            yield Batch(block, zero[start : start + _ZERO_BATCH_PAGES], is_zero=True)
    begins = np.concatenate(([0], np.flatnonzero(np.diff(order[:, 0])) + 1, [len(order)]))
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        if begin == end:
            continue
        block = int(order[begin, 0])
        if host_pages[block] > 1:
            continue
        pages = order[begin:end, 1]
        pages = pages[present[block][pages]]
        for start in range(0, len(pages), batch_pages):
            yield Batch(block, pages[start : start + batch_pages])

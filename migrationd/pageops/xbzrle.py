"""XBZRLE: a page as an edit of its previous content.

    encoded := { zrun nzrun }+     zrun: unchanged bytes to skip, nzrun: bytes that replace
    count   := one byte below 0x80, or two: low 7 bits | 0x80, then the high 7 bits

Reference: stream format 2.5.
"""

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]


def decode_pages(data: _Bytes, begins: _Numbers, ends: _Numbers, pages: _Bytes) -> None:
    """Apply edits to pages in place, the n-th pair of runs of all of them at once.

    Args:
        data: Where the edits are.
        begins: Index of each edit, shape ``(n,)``.
        ends: Index behind it, shape ``(n,)``; not before ``begins``.
        pages: Previous contents, shape ``(n, page_size)``, contiguous; the new ones afterwards.

    Raises:
        ValueError: An edit is malformed or leaves its page; no page was changed.
    """
    page_size = pages.shape[1]
    row = np.flatnonzero(begins < ends)
    at, end = begins[row], ends[row]
    target = np.zeros(len(row), np.int64)
    rows, targets, sources, lengths = [], [], [], []
    while len(row):
        skip, at = _counts(data, at, end)
        if (~skip.astype(np.bool_) & (target > 0)).any():
            raise ValueError("an empty run of unchanged bytes")
        target = target + skip
        length, at = _counts(data, at, end)
        if not length.all():
            raise ValueError("an empty run of changed bytes")
        if (target + length > page_size).any() or (at + length > end).any():
            raise ValueError("a run leaves the page or the record")
        rows.append(row)
        targets.append(target)
        sources.append(at)
        lengths.append(length)
        at = at + length
        left = at < end
        row, at, end, target = row[left], at[left], end[left], (target + length)[left]
    if rows:
        count = np.concatenate(lengths)
        place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        to = np.concatenate(rows) * page_size + np.concatenate(targets)
        changed = data[np.repeat(np.concatenate(sources), count) + place]
        pages.reshape(-1)[np.repeat(to, count) + place] = changed


def _counts(data: _Bytes, at: _Numbers, end: _Numbers) -> tuple[_Numbers, _Numbers]:
    """A count at each place, and the places behind them."""
    if (at >= end).any():
        raise ValueError("the edit ends inside a pair")
    low = data[at].astype(np.int64)
    is_long = low >= 0x80
    behind = at + 1 + is_long
    if not is_long.any():
        return low, behind
    if (behind > end).any():
        raise ValueError("a malformed count")
    high = np.where(is_long, data[behind - 1], 0).astype(np.int64)
    if (high >= 0x80).any():
        raise ValueError("a malformed count")
    return low & 0x7F | high << 7, behind


def decode_page(encoded: bytes, page: bytearray) -> None:
    """Apply an edit to a page in place.

    Args:
        encoded: The edit.
        page: Previous content of the page; holds the new one afterwards.

    Raises:
        ValueError: The edit is malformed or leaves the page.
    """
    at = 0
    target = 0
    while at < len(encoded):
        skip, at = _count(encoded, at)
        if not skip and target:
            raise ValueError("an empty run of unchanged bytes")
        target += skip
        length, at = _count(encoded, at)
        if not length:
            raise ValueError("an empty run of changed bytes")
        if target + length > len(page) or at + length > len(encoded):
            raise ValueError("a run leaves the page or the record")
        page[target : target + length] = encoded[at : at + length]
        target += length
        at += length


def _count(encoded: bytes, at: int) -> tuple[int, int]:
    if at >= len(encoded):
        raise ValueError("the edit ends inside a pair")
    first = encoded[at]
    if first < 0x80:
        return first, at + 1
    if at + 1 >= len(encoded) or encoded[at + 1] >= 0x80:
        raise ValueError("a malformed count")
    return first & 0x7F | encoded[at + 1] << 7, at + 2

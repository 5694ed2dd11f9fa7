"""Short digests of pages, to see later which of them have changed. Pure."""

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]

_CHUNK_PAGES = 4096


def page_digests(
    memory: npt.NDArray[np.uint8], page_size: int, pages: npt.NDArray[np.int64]
) -> Digests:
    """Digests of some pages.

    Args:
        memory: The whole block, one dimension.
        page_size: Bytes, a multiple of 8.
        pages: Page numbers, shape ``(n,)``.

    Returns:
        One number per page, shape ``(n,)``; a changed 8-byte word changes it, and so do
        several but for one chance in 2^64.
    """
    words = memory[: memory.size // page_size * page_size].view(np.uint64)
    rows = words.reshape(-1, page_size // 8)
    weights = np.random.default_rng(page_size).integers(
        0, 1 << 63, page_size // 8, dtype=np.uint64
    ) * np.uint64(2) + np.uint64(1)
    found = [
        (rows[pages[start : start + _CHUNK_PAGES]] * weights).sum(axis=1, dtype=np.uint64)
        for start in range(0, len(pages), _CHUNK_PAGES)
    ]
    return np.concatenate(found) if found else np.empty(0, np.uint64)

"""XBZRLE in memory: how fast pages become edits and edits become pages, on one core.

    python -m benchmarks.xbzrle

CPU time only, so that it means something on a machine that does other work, too. The first two
lines are what the goal is about: pages that were written and hardly changed.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migrationd.pageops.xbzrle import decode_pages
from migrationd.pageops.xbzrle_cache import XbzrleCache
from migrationd.pageops.xbzrle_encode import encode_pages

PAGE = 4096
BATCH_PAGES = 512
BATCHES = 64
GOAL_GB_PER_S = 1.0

Pages = npt.NDArray[np.uint8]


def every(step: int) -> Callable[[Pages], None]:
    """Change a byte out of so many."""

    def change(pages: Pages) -> None:
        pages[:, ::step] += 1

    return change


def unchanged(pages: Pages) -> None:
    """Write what is there already."""


def one_word(pages: Pages) -> None:
    """Change a counter in each page."""
    pages.view(np.uint64)[:, 0] += 1


CHANGES: dict[str, Callable[[Pages], None]] = {
    "unchanged": unchanged,
    "one word of each": one_word,
    "4 runs of a byte": every(1024),
    "64 runs of a byte": every(64),
    "every byte": every(1),
}


class Stopwatch:
    """Adds up CPU seconds of what runs inside it."""

    def __init__(self) -> None:
        self.cpu_s = 0.0

    def __enter__(self) -> None:
        self.cpu_s -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time()


def main() -> None:
    """Measure and print."""
    random = np.random.default_rng(1)
    count = BATCH_PAGES * BATCHES
    guest = random.integers(0, 256, (count, PAGE), np.uint8)
    keys = np.arange(count)
    print(f"{'change':<20}{'encode GB/s':>13}{'with the cache':>16}{'decode pages/s':>16}")
    for name, change in CHANGES.items():
        cache = XbzrleCache(count * PAGE, PAGE, count)
        cache.begin_round()
        cache.fill(keys, guest)
        old = guest.copy()
        change(guest)
        encoding, looking_up, decoding = Stopwatch(), Stopwatch(), Stopwatch()
        decoded = 0
        for begin in range(0, count, BATCH_PAGES):
            rows = slice(begin, begin + BATCH_PAGES)
            with encoding:
                encoded = encode_pages(old[rows], guest[rows])
            with looking_up:
                cache.update(keys[rows], guest[rows].copy())
            begins = np.concatenate(([0], encoded.ends[:-1]))
            with decoding:
                decode_pages(encoded.data, begins, encoded.ends, old[rows])
            decoded += int(encoded.is_encoded.sum())
            is_whole = encoded.is_changed & ~encoded.is_encoded
            assert (old[rows][~is_whole] == guest[rows][~is_whole]).all()
        total = count * PAGE / 1e9
        verdict = ""
        if name in ("unchanged", "one word of each"):
            verdict = "  ok" if total / looking_up.cpu_s >= GOAL_GB_PER_S else "  --"
            verdict += f" (goal: {GOAL_GB_PER_S:.0f} GB/s)"
        rate = f"{decoded / decoding.cpu_s:,.0f}" if decoded else "-"
        speeds = f"{total / encoding.cpu_s:>13.2f}{total / looking_up.cpu_s:>16.2f}"
        print(f"{name:<20}{speeds}{rate:>16}{verdict}")


if __name__ == "__main__":
    main()

"""How long the fuzzers look: ``make fuzz FUZZ_TIMES=50`` takes fifty times as many cases."""

import os

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def cases(count: int) -> int:
    """How many cases to take where the default run takes so many."""
    return count * TIMES

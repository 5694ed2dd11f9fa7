"""How many descriptors this process has open."""

import gc
import os


def open_count() -> int:
    """Open descriptors, once what earlier tests left in cycles is closed.

    Without that, the collector closes it between two counts.
    """
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

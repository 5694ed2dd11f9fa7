"""Scheduling of single threads."""

import contextlib
import os
import threading
from collections.abc import Iterator

_URGENT_NICE = -10


@contextlib.contextmanager
def urgent_thread() -> Iterator[None]:
    """Let this thread go before others inside the block, where the user may ask for that.

    On a machine that is busy a thread that sleeps in a system call most of the time is woken
    at once; without the privilege it takes its turn like any other.
    """
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, min(before, _URGENT_NICE))
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, before)

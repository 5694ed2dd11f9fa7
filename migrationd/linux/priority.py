"""Scheduling of single threads."""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_URGENT_NICE = -10
_URGENT_TURN_S = 50e-6

_PR_SET_TIMERSLACK = 29
_LEAST_SLACK_NS = 1
_USUAL_SLACK_NS = 0

_libc = ctypes.CDLL(None)

_lock = threading.Lock()
_turns: list[float] = []


@contextlib.contextmanager
def urgent_thread() -> Iterator[None]:
    """Let this thread go before others inside the block, where the user may ask for that.

    On a machine that is busy a thread that sleeps in a system call most of the time is woken
    at once; without the privilege it takes its turn like any other. Threads that execute
    Python meanwhile give way after a short turn, whose length is that of before at the end.
    The kernel lets other threads wait for up to as long again before it ends their wait.
    """
    with _lock:
        _turns.append(sys.getswitchinterval())
        sys.setswitchinterval(min(_turns[0], _URGENT_TURN_S))
    try:
        with _in_front():
            yield
    finally:
        with _lock:
            before_s = _turns[0]
            _turns.pop()
            if not _turns:
                sys.setswitchinterval(before_s)


@contextlib.contextmanager
def _in_front() -> Iterator[None]:
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_LEAST_SLACK_NS))
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, min(before, _URGENT_NICE))
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_USUAL_SLACK_NS))
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, before)

"""Waiting without sleeping blindly: poll a condition until a deadline."""

import asyncio
import time
from collections.abc import Awaitable, Callable

AT_ONCE_S = 5.0
"""Longest answer of a monitor that waits for nobody, on a machine that stalls for a second."""


async def until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]],
    what: str,
    timeout_s: float = 30.0,
) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: It does not, in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert loop.time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll on a thread without an event loop until the condition holds.

    Raises:
        AssertionError: It does not, in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)

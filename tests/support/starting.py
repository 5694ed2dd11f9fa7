"""Peers that start while something else goes on: most of a test's time is their starting."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Generic, TypeVar

from migrationd.ctl.peer_process import PeerProcess

P = TypeVar("P", bound=PeerProcess)
Q = TypeVar("Q", bound=PeerProcess)


async def start_both(
    keep: list[object] | AsyncExitStack, first: Awaitable[P], second: Awaitable[Q]
) -> tuple[P, Q]:
    """Start two at once.

    Args:
        keep: Closes each that has started, whatever becomes of the other: a stack, or the list
            of the fixture ``closing``.
        first: Starts one.
        second: Starts the other.
    """
    one, other = await asyncio.gather(first, second, return_exceptions=True)
    for peer in (one, other):
        if isinstance(peer, PeerProcess):
            if isinstance(keep, list):
                keep.append(peer)
            else:
                keep.push_async_callback(peer.close)
    if isinstance(one, BaseException):
        raise one
    if isinstance(other, BaseException):
        raise other
    return one, other


class Ahead(Generic[P]):
    """Starts the next peer of a row while the last one is used.

    Args:
        start: Starts a peer, by its number.
        closing: Takes the peers.
    """

    def __init__(
        self, start: Callable[[int], Coroutine[object, object, P]], closing: list[object]
    ) -> None:
        self._start = start
        self._closing = closing
        self._number = 0
        self._next = asyncio.create_task(start(0))
        closing.append(self)

    async def take(self) -> P:
        """The next one; the one behind it begins to start."""
        peer = await self._next
        self._closing.append(peer)
        self._number += 1
        self._next = asyncio.create_task(self._start(self._number))
        return peer

    async def close(self) -> None:
        """Close the one that nobody took."""
        [peer] = await asyncio.gather(self._next, return_exceptions=True)
        if isinstance(peer, PeerProcess):
            await peer.close()

"""Host names to socket addresses, without holding the loop or a pool's thread.

A name server may take half a minute to stay silent. The look-up therefore has a
daemon thread of its own, which a cancelled caller leaves behind to end by itself.
"""

import asyncio
import contextlib
import os
import socket
import threading
from typing import cast

from migrationd.errors import ConnectFailed
from migrationd.transport.address import InetAddress

SocketTarget = str | bytes | tuple[str | int, ...]
"""What ``connect`` and ``bind`` take."""

Found = tuple[int, tuple[str | int, ...]]
"""Family and socket address of one result."""

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


async def resolve(address: InetAddress, *, passive: bool) -> list[Found]:
    """Look an address up.

    Args:
        address: Host and port, and the families that are allowed.
        passive: Whether it is for listening: no host means any.

    Returns:
        Socket family and socket address of each result, in the resolver's order.

    Raises:
        ConnectFailed: With QEMU's text around the resolver's.
    """
    family = _family(address)
    flags = socket.AI_PASSIVE if passive else 0
    # As bytes: the resolver is not asked for an encoded form of the name.
    host = None if passive and not address.host else os.fsencode(address.host)
    try:
        try:
            found = _look_up(host, address.port, family, flags | _NUMERIC)
        except socket.gaierror:
            found = await _look_up_in_thread(host, address.port, family, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConnectFailed(
            f"address resolution failed for {address.host}:{address.port}: {reason}"
        ) from error
    return found


def _family(address: InetAddress) -> int:
    """The one family that the address allows, or ``AF_UNSPEC``."""
    ipv4, ipv6 = address.ipv4, address.ipv6
    if ipv4 is False and ipv6 is False:
        raise ConnectFailed("Cannot disable IPv4 and IPv6 at same time")
    if ipv4 and ipv6:
        return socket.AF_UNSPEC
    if ipv6 or ipv4 is False:
        return socket.AF_INET6
    if ipv4 or ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC


def _look_up(host: bytes | None, port: str, family: int, flags: int) -> list[Found]:
    found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=flags)
    # The stubs allow for a tuple that a Python without IPv6 gives.
    return [(int(item[0]), cast("tuple[str | int, ...]", item[4])) for item in found]


async def _look_up_in_thread(host: bytes | None, port: str, family: int, flags: int) -> list[Found]:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Found]] = loop.create_future()

    def deliver(result: list[Found] | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        elif result is not None:
            answer.set_result(result)

    def work() -> None:
        outcome: tuple[list[Found] | None, Exception | None]
        try:
            outcome = (_look_up(host, port, family, flags), None)
        except Exception as error:  # handed to the task that waits
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=work, name="resolver", daemon=True).start()
    return await answer

"""The connections of one incoming migration: how many come, and which one is which.

    main      the first one, or the one that begins with the stream's magic
    multifd   those that begin with multifd's magic; their hello is read here
    preempt   what comes when all the others are there; it is silent at first

Nothing of a main or preempt connection is consumed. With multifd, order says nothing:
connections are told apart by their first bytes, which are looked at, not taken. One that
cannot be looked at (TLS) is taken in order, main first.

Reference: stream format 3.1 and 3.7.
"""

import asyncio
import contextlib
import logging

from migrationd.codec.constants import QEMU_VM_FILE_MAGIC
from migrationd.codec.multifd import HELLO_BYTES, MULTIFD_MAGIC, Hello, decode_hello
from migrationd.errors import (
    ChannelClosed,
    ChannelError,
    MigrationdError,
    StreamCorrupt,
    StreamUnsupported,
)
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener

log = logging.getLogger(__name__)

COMPLETE_WAIT_S = 30.0
"""Longest time from the first connection to the last one."""

_LOOK_S = 0.25
_PARTIAL_S = 0.01
_STRAY_S = 1.0
"""For the first bytes of connections that nobody expected."""

_STRAY_CONNECTIONS = 32
"""Connections beyond the expected ones that may wait to be told apart."""


class IncomingChannels:
    """Accepts and sorts the connections of one source; lives on the event loop.

    Args:
        listener: Where they come from; closed as soon as nothing more is expected.
        wait_s: Longest time from the first connection to the last one.

    Attributes:
        source_uuid: What the hellos said, 16 bytes; None before the first one.
    """

    def __init__(self, listener: Listener, wait_s: float = COMPLETE_WAIT_S) -> None:
        self._listener = listener
        self._wait_s = wait_s
        self._expected = 0
        self._uuid: bytes | None = None
        self._all: list[Channel] = []
        self._main: Channel | None = None
        self._by_id: dict[int, Channel] = {}
        self._silent: list[Channel] = []
        self.source_uuid: bytes | None = None

    @property
    def multifd(self) -> tuple[Channel, ...]:
        """Channels of multifd by number; complete after :meth:`gather`."""
        return tuple(self._by_id[number] for number in sorted(self._by_id))

    async def accept_first(self) -> None:
        """Wait for the source; what its connections are is found out by :meth:`gather`.

        Raises:
            ConnectFailed: The listener broke or was closed.
        """
        await self._accept()

    async def gather(
        self, *, multifd: int = 0, expects_preempt: bool = False, uuid: bytes | None = None
    ) -> Channel:
        """Wait for all connections that a source makes before it sends pages.

        Args:
            multifd: Channels besides the main one.
            expects_preempt: Whether one more comes, then or later.
            uuid: What the hellos must say, 16 bytes; None takes any, the same from all.

        Returns:
            The main connection.

        Raises:
            ChannelError: Not all came in time, or one ended.
            StreamError: A connection begins with something else, or contradicts another.
        """
        self._expected = multifd
        self._uuid = uuid
        if not multifd:
            self._main = self._all[0]
            if not expects_preempt:
                await self._refuse_multifd()
        else:
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._sort()
            except TimeoutError:
                raise ChannelError(self._missing_text()) from None
        if not expects_preempt:
            # What else comes must fail at once: in the backlog, both sides would wait for ever.
            self._listener.close()
            self._drop_silent()
        assert self._main is not None
        return self._main

    async def accept_preempt(self) -> Channel:
        """Wait for the connection that carries urgent pages; after :meth:`gather`, once.

        Raises:
            ConnectFailed: The listener was closed.
        """
        channel = self._silent.pop(0) if self._silent else await self._accept()
        self._listener.close()
        self._drop_silent()
        return channel

    def shutdown(self) -> None:
        """End every data call on every connection."""
        for channel in self._all:
            channel.shutdown()

    def close(self) -> None:
        """Close every connection and the listener."""
        self._listener.close()
        for channel in self._all:
            channel.close()

    async def _accept(self) -> Channel:
        channel = await self._listener.accept()
        self._all.append(channel)
        return channel

    async def _refuse_multifd(self) -> None:
        """Say at once that the source has multifd on: without its channels it may stand still."""
        self._silent = await self._listener.waiting(_STRAY_S)
        self._all += self._silent
        if any(await asyncio.gather(*map(self._is_multifd, self._silent))):
            raise StreamUnsupported(
                "the source has multifd on, here it is off",
                section="multifd",
                hint="set the same capabilities at both ends",
            )

    async def _is_multifd(self, channel: Channel) -> bool:
        try:
            async with asyncio.timeout(_STRAY_S):
                return await self._identify(channel) is not None
        except (TimeoutError, MigrationdError):
            return False

    async def _sort(self) -> None:
        first = self._all[0]
        looking = {asyncio.create_task(self._identify(first)): first}
        accepting = asyncio.create_task(self._accept())
        try:
            while self._main is None or len(self._by_id) < self._expected:
                done, _ = await asyncio.wait(
                    {accepting, *looking}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                if accepting in done:
                    channel = accepting.result()
                    if len(looking) > self._expected + _STRAY_CONNECTIONS:
                        raise StreamCorrupt("too many connections", section="multifd")
                    looking[asyncio.create_task(self._identify(channel))] = channel
                    accepting = asyncio.create_task(self._accept())
                for look in [task for task in looking if task in done]:
                    self._place(looking.pop(look), look.result())
                if not done and self._main is not None and self._main.is_hung_up():
                    raise ChannelClosed(
                        "the source closed the connection while its channels were awaited"
                    )
            self._silent = list(looking.values())
        finally:
            for task in (accepting, *looking):
                task.cancel()
            await asyncio.gather(accepting, *looking, return_exceptions=True)

    async def _identify(self, channel: Channel) -> Hello | None:
        """What a multifd channel says, or None for a main connection."""
        if not channel.can_peek:
            if self._all[0] is channel:
                return None
            return await self._read_hello(channel)
        while True:
            await channel.wait_readable()
            with contextlib.suppress(BlockingIOError):
                magic = channel.peek(4)
                if len(magic) == 4:
                    break
                if not magic:
                    raise ChannelClosed("a connection ended before its first bytes")
                await asyncio.sleep(_PARTIAL_S)
        number = int.from_bytes(magic, "big")
        if number == QEMU_VM_FILE_MAGIC:
            return None
        if number != MULTIFD_MAGIC:
            raise StreamCorrupt(f"Unknown channel magic: {number:#010x}", section="multifd")
        return await self._read_hello(channel)

    async def _read_hello(self, channel: Channel) -> Hello:
        data = b""
        while len(data) < HELLO_BYTES:
            await channel.wait_readable()
            with contextlib.suppress(BlockingIOError):
                piece = channel.recv_some(HELLO_BYTES - len(data))
                if not piece:
                    raise ChannelClosed("a multifd channel ended inside its hello")
                data += piece
        return decode_hello(data)

    def _place(self, channel: Channel, hello: Hello | None) -> None:
        if hello is None:
            if self._main is not None:
                raise StreamCorrupt("a second main connection", section="multifd")
            self._main = channel
            return
        if hello.channel >= self._expected:
            raise StreamCorrupt(
                f"received channel id {hello.channel} is greater than number of channels "
                f"{self._expected}",
                section="multifd",
                hint="set the same multifd-channels at both ends",
            )
        if hello.channel in self._by_id:
            raise StreamCorrupt(f"channel {hello.channel} came twice", section="multifd")
        expected = self._uuid if self._uuid is not None else self.source_uuid
        if expected is None:
            self.source_uuid = hello.uuid
        elif hello.uuid != expected:
            raise StreamCorrupt(
                f"received uuid {hello.uuid.hex()} and expected uuid {expected.hex()} "
                f"for channel {hello.channel}",
                section="multifd",
                hint="start the daemon with the source's -uuid",
            )
        self._by_id[hello.channel] = channel

    def _drop_silent(self) -> None:
        for channel in self._silent:
            log.warning("a connection that nobody expected was closed")
            channel.close()
        self._silent.clear()

    def _missing_text(self) -> str:
        if self._main is None:
            return f"no main connection came in {self._wait_s:g} s"
        return (
            f"only {len(self._by_id)} of {self._expected} multifd channels came in "
            f"{self._wait_s:g} s; set the same multifd-channels at both ends"
        )

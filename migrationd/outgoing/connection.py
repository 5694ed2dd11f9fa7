"""One connection of an outgoing migration: its channels, its threads, its end.

A migration has one, and a postcopy one more for each time that it is resumed. Lives on
the event loop; what blocks runs on its threads, and ends because its channel is shut down.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from migrationd.codec.postcopy import encode_ping
from migrationd.errors import ChannelClosed, ChannelError, MigrationCancelled
from migrationd.outgoing.device_save import READY_PING
from migrationd.outgoing.postcopy import OpenChannel, PostcopyLink
from migrationd.outgoing.return_path import ReturnPath
from migrationd.transport.channel import Channel

if TYPE_CHECKING:
    from migrationd.outgoing.multifd_connect import OutgoingMultifd

_FIRST_QUESTION = 0x1000
"""PINGs of :meth:`OutgoingConnection.ask` have numbers above it: smaller ones mean something."""

_CHECK_S = 0.1
"""How often somebody who waits for an answer looks whether the connection still is."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_READY_WAIT_S = 30.0

_BEGINNING_BYTES = 16 << 20
"""More than sockets take in before somebody reads: who closes later has read."""

_LAST_WORD_S = 0.2
"""How long a destination that closed may take to have said why."""


class OutgoingConnection:
    """Owns the main channel and what was opened beside it.

    Args:
        channel: Main channel, connected.
        open_channel: Opens another connection to the same destination.

    Attributes:
        channel: Main channel.
        open_channel: As given.
        executor: Runs what blocks: the sending thread, and two more for a postcopy.
        link: The postcopy's part, if the migration may become one.
        multifd: The multifd channels, once there are some.
        tail_started: Set when the last byte of the stream may be on its way.
    """

    def __init__(
        self, channel: Channel, open_channel: OpenChannel, tail_started: threading.Event
    ) -> None:
        self.channel = channel
        self.open_channel = open_channel
        self.executor = ThreadPoolExecutor(3, thread_name_prefix="outgoing")
        self.link: PostcopyLink | None = None
        self.multifd: OutgoingMultifd | None = None
        self.tail_started = tail_started
        self._return_path: ReturnPath | None = None
        self._peer_ready = asyncio.Event()
        self._asked = _FIRST_QUESTION
        self._last_pong = -1
        self._answered = threading.Event()
        self._stop = threading.Event()

    async def on_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a step on the sending thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, call, *args)

    def check(self) -> None:
        """Raise if the connection is ended.

        Raises:
            MigrationCancelled: It is.
        """
        if self._stop.is_set():
            raise MigrationCancelled("cancelled")

    def wait(self, delay_s: float) -> None:
        """Wait, on a thread, unless the connection ends.

        Raises:
            MigrationCancelled: It ends.
        """
        if self._stop.wait(delay_s):
            raise MigrationCancelled("cancelled")

    @property
    def has_switchover_ack(self) -> bool:
        """Whether the destination is ready for the switchover, and said so."""
        reader = self.link or self._return_path
        return reader is not None and reader.has_switchover_ack

    @property
    def is_connecting(self) -> bool:
        """Whether a further connection is being made, which only a cancelled task ends."""
        return self.multifd is not None and self.multifd.is_connecting

    @property
    def may_have_package(self) -> bool:
        """Whether the destination of a postcopy has all that it needs to run the guest."""
        return self.link is not None and self.link.may_run_there

    async def stream(self, send: Callable[[], Awaitable[None]], *, has_return_path: bool) -> None:
        """Send, and read what the destination says until it has said all.

        Raises:
            MigrationdError: What ended it; the destination's own word first.
        """
        if not has_return_path:
            try:
                await send()
                await self.on_thread(self.channel.finish)
            except ChannelClosed as error:
                self._explain(error)
                raise
            return
        self._return_path = ReturnPath(self.channel, self.tail_started.is_set, self.on_pong)
        read = self.link.read if self.link else self._return_path.run
        reader = asyncio.create_task(read(), name="return path")
        sender = asyncio.ensure_future(send())
        try:
            await asyncio.wait((reader, sender), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and reader.exception() is not None:
                reader.result()
            try:
                await sender
            except ChannelError:
                # The destination's own word says more than a broken pipe.
                await asyncio.wait((reader,), timeout=_LAST_WORD_S)
                if reader.done():
                    reader.result()
                raise
            await reader
        except ChannelClosed as error:
            self._explain(error)
            raise
        finally:
            self._stop.set()
            self.break_off()
            for task in (reader, sender):
                task.cancel()
            await asyncio.gather(reader, sender, return_exceptions=True)

    def _explain(self, error: ChannelClosed) -> None:
        """Say what the end of a connection that has just begun may mean."""
        channels = [self.channel, *(self.multifd.channels if self.multifd is not None else ())]
        why = self.channel.why_silent
        has_begun = sum(channel.bytes_sent for channel in channels) < _BEGINNING_BYTES
        if why is not None and has_begun and not self._stop.is_set():
            error.args = (f"{error}; {why}",)

    async def wait_peer_ready(self) -> None:
        """Wait for the answer to :func:`ready_ping`.

        Raises:
            ChannelError: It does not come in time.
        """
        try:
            async with asyncio.timeout(_READY_WAIT_S):
                await self._peer_ready.wait()
        except TimeoutError:
            raise ChannelError("the destination does not answer") from None

    @property
    def can_ask(self) -> bool:
        """Whether :meth:`ask` has somebody to ask."""
        return self._return_path is not None

    def ask(self) -> int:
        """Wait, on the sending thread, until the destination has taken in all that was sent.

        Returns:
            Bytes sent for it.

        Raises:
            ChannelError: The channel broke.
            MigrationCancelled: The connection ends.
        """
        self._asked += 1
        data = encode_ping(self._asked)
        self._answered.clear()
        if self.link is not None:
            self.link.expect_answer()
        self.channel.send(data)
        while self._last_pong != self._asked:
            self._answered.wait(_CHECK_S)
            self._answered.clear()
            self.check()
        return len(data)

    async def wait_confirmed(self) -> bytes:
        """Wait until the destination confirms that it holds the guest.

        Returns:
            What it said behind that.
        """
        assert self._return_path is not None
        await self._return_path.confirmed.wait()
        return self._return_path.rest

    def on_pong(self, number: int) -> None:
        """The destination has read the stream up to the PING of this number."""
        if number == READY_PING:
            self._peer_ready.set()
        self._last_pong = number
        self._answered.set()

    def break_off(self) -> None:
        """End every call on the main channel and the postcopy's, as a lost connection would."""
        for end in (self.channel, self.link):
            if end is not None:
                end.shutdown()

    def cancel(self) -> None:
        """End what runs, without its end being an error of the connection."""
        self._stop.set()
        for end in (self.channel, self.multifd):
            if end is not None:
                end.shutdown()

    def shutdown(self) -> None:
        """End every call on every channel."""
        self._stop.set()
        for end in (self.channel, self.multifd, self.link):
            if end is not None:
                end.shutdown()

    async def aclose(self) -> None:
        """End the threads, then close everything."""
        self.shutdown()
        # A multifd channel's thread ends with the packet that it compresses.
        await asyncio.to_thread(self._end_threads)
        for end in (self.channel, self.multifd, self.link):
            if end is not None:
                end.close()

    def _end_threads(self) -> None:
        if self.multifd is not None:
            self.multifd.stop()
        self.executor.shutdown(wait=True)

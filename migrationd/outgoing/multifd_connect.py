"""The multifd channels of one outgoing migration, from their connection to their end.

Reference: stream format 3.1 and 3.7.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.codec.multifd import Hello, encode_hello
from migrationd.errors import MigrationError
from migrationd.guest.base import Guest
from migrationd.migration.dialect import Dialect
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.multifd_save import MultifdSaver
from migrationd.outgoing.multifd_send import MultifdSender, MultifdSettings
from migrationd.outgoing.ram_save import RamSaver
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter


class OutgoingMultifd:
    """Owns the channels; lives on the event loop, but for :meth:`stop`.

    Args:
        open_channel: Makes one more connection to the destination.
        settings: Parameters.
        stats: Counters of the migration.
        limiter: Its bandwidth limit.
        clock: Time.
        wait: Called with seconds to wait for the limit; raises when the migration ends.
        should_stop: Asked before each batch: postcopy is to send the rest.
        sent: By block name one bool per page, set for pages that went out; or None.

    Attributes:
        channels: Those that are connected, by number.
        is_connecting: Whether a connection is being made, which only a cancel ends.
    """

    def __init__(
        self,
        open_channel: Callable[[], Awaitable[Channel]],
        settings: MultifdSettings,
        *,
        stats: OutgoingStats,
        limiter: RateLimiter,
        clock: Clock,
        wait: Callable[[float], None],
        should_stop: Callable[[], bool],
        sent: Mapping[str, npt.NDArray[np.bool_]] | None,
    ) -> None:
        self._open_channel = open_channel
        self._settings = settings
        self._stats = stats
        self._limiter = limiter
        self._clock = clock
        self._wait = wait
        self._should_stop = should_stop
        self._sent = sent
        self._sender: MultifdSender | None = None
        self.channels: list[Channel] = []
        self.is_connecting = False

    async def connect(self, ram: RamSaver, guest: Guest, dialect: Dialect) -> MultifdSaver:
        """Open the channels in the order of their numbers and say hello on each.

        Args:
            ram: The handler of the main connection.
            guest: Whose pages are sent.
            dialect: Its wire dialect.

        Raises:
            MigrationError: The guest may turn to postcopy, and its destination dies of that.
            ConnectFailed: A connection cannot be made, or has no zero copy.
            ChannelClosed: The destination ended one.
        """
        settings = self._settings
        if self._sent is not None and dialect.multifd_flush_after_each_section:
            # 7.2 accepts the pair, but aborts at the end of postcopy: the guest would be lost.
            raise MigrationError(
                "Postcopy is not yet compatible with multifd for machine types up to 8.0"
            )
        if dialect.zero_pages_on_main and settings.zero_page_detection == "multifd":
            settings = replace(settings, zero_page_detection="legacy")
        for number in range(settings.channels):
            self._wait(0)  # a cancel that came while nothing was being connected
            self.is_connecting = True
            channel = await self._open_channel()
            self.is_connecting = False
            self.channels.append(channel)
            hello = encode_hello(Hello(number, settings.uuid))
            await asyncio.to_thread(channel.send, hello)
        self._sender = MultifdSender(
            self.channels,
            page_size=guest.page_size,
            settings=settings,
            is_live=guest.live is not None,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=self._wait,
            should_stop=self._should_stop,
            sent=self._sent,
        )
        return MultifdSaver(
            ram,
            self._sender,
            guest.ram,
            flush_after_each_section=dialect.multifd_flush_after_each_section,
            zeros_on_main=settings.zero_page_detection == "legacy",
        )

    def shutdown(self) -> None:
        """End every call on every channel."""
        for channel in self.channels:
            channel.shutdown()

    def close(self) -> None:
        """Close the channels."""
        for channel in self.channels:
            channel.close()

    def stop(self) -> None:
        """End the channels' threads and wait for them; on a thread of its own."""
        if self._sender is not None:
            self._sender.stop()

"""The destination's answers, read while the stream goes out.

A coroutine: the messages are small and few, and each one changes what the
driver does next.

Reference: stream format 5; QEMU's source ends the migration at the first SHUT.
"""

import asyncio
from collections.abc import Callable

from migrationd.codec.return_path import Pong, ReturnPathDecoder, Shut, SwitchoverAck
from migrationd.errors import ChannelClosed, PeerFailed, StreamCorrupt, StreamUnsupported
from migrationd.transport.channel import Channel

RECEIVE_BYTES = 4096


class ReturnPath:
    """Reader of one return path.

    Args:
        channel: The main channel.
        may_end: Tells whether the last part of the stream is on its way; a SHUT 0 before
            that cannot be true.
        on_pong: Called with the number of each PONG.
    """

    def __init__(
        self,
        channel: Channel,
        may_end: Callable[[], bool],
        on_pong: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_pong = on_pong
        self._channel = channel
        self._may_end = may_end
        self._decoder = ReturnPathDecoder()
        self.has_switchover_ack = False
        self.confirmed = asyncio.Event()

    @property
    def rest(self) -> bytes:
        """What came behind the last message."""
        return self._decoder.rest

    async def run(self) -> None:
        """Read until the destination confirms that it holds the guest (SHUT 0).

        Raises:
            PeerFailed: SHUT with another value.
            ChannelClosed: The destination went away without a SHUT.
            StreamError: Bytes that are no return-path message, or one that does not belong here.
        """
        while True:
            await self._channel.wait_readable()
            try:
                data = self._channel.recv_some(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                raise ChannelClosed(
                    "the destination closed the connection before it confirmed the migration"
                )
            for message in self._decoder.feed(data):
                match message:
                    case Shut(value=0):
                        if not self._may_end():
                            raise StreamCorrupt(
                                "SHUT 0 before the end of the stream", section="return path"
                            )
                        self.confirmed.set()
                        return
                    case Shut(value=value):
                        raise PeerFailed(f"Sibling indicated error {value}")
                    case Pong(value=value):
                        self._on_pong(value)
                    case SwitchoverAck():
                        self.has_switchover_ack = True
                    case _:
                        raise StreamUnsupported(
                            f"{type(message).__name__} outside postcopy", section="return path"
                        )

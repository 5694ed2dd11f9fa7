"""The destination's answers, written from any thread to whichever connection there is.

Reference: stream format 5.
"""

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

from migrationd.codec.return_path import ReturnPathMessage, Shut, encode_return_path
from migrationd.errors import ChannelError, StreamUnsupported

if TYPE_CHECKING:
    from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0


class ReturnPath:
    """What goes back to the source of one incoming migration.

    Attributes:
        channel: The connection to the source; None before it came.
        is_open: Whether the source listens.
    """

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self.channel: Channel | None = None
        self.is_open = False

    def open(self, position: int) -> None:
        """The source says that it listens, at this position of the stream.

        Raises:
            StreamUnsupported: Nothing can go back on this connection.
        """
        assert self.channel is not None
        if not self.channel.is_duplex:
            raise StreamUnsupported(
                "the source opens a return path, but this transport has none",
                position=position,
                hint="turn the source's return-path capability off",
            )
        self.is_open = True

    def answer(self, message: ReturnPathMessage) -> None:
        """Send one message.

        Raises:
            ChannelError: The connection is lost.
        """
        self.send(encode_return_path(message))

    def send(self, data: bytes) -> None:
        """Send whole messages.

        Raises:
            ChannelError: The connection is lost.
        """
        assert self.channel is not None
        with self._writing:
            if self.channel.is_socket:
                self.channel.send_parts((data,))
            else:
                self.channel.send(data)

    async def answer_last(self, message: Shut) -> None:
        """Say how it ended to a source that listens, and to nobody for ever."""
        if not self.is_open:
            return
        try:
            await asyncio.wait_for(asyncio.to_thread(self.answer, message), _FAREWELL_S)
        except (ChannelError, TimeoutError) as failure:
            log.debug("SHUT %d was not sent: %s", message.value, failure)

"""The pages of one preempt channel, placed one by one for a guest that waits for each of them."""

import ctypes
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

from migrationd.codec.urgent import UrgentDecoder
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.transport.channel import Channel


class UrgentPages:
    """Receives and places; by one thread at a time.

    Args:
        channel: Where they come from; not owned.
        decoder: Of the channel.
        blocks: RAM blocks in the order of that list.
        data: What was received already.

    Attributes:
        is_ended: Nothing comes any more.
    """

    def __init__(
        self,
        channel: Channel,
        decoder: UrgentDecoder,
        blocks: Sequence[WorkloadBlock],
        data: bytes,
    ) -> None:
        self._channel = channel
        self._blocks = tuple(blocks)
        self._decoder = decoder
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._decoder.buffer))
        self._early = data
        self._left = threading.Event()
        self._error: Exception | None = None
        self.is_ended = False

    def run(self) -> None:
        """Place what comes, to the end.

        Raises:
            ChannelError: The channel broke.
            StreamError: The bytes are no pages of this guest.
            GuestError: The pages cannot be placed.
        """
        while not self.is_ended:
            self._place(self._channel.recv_into(self._decoder.free_view(), None))

    def place_now(self) -> bool:
        """Place what is there, without waiting; inside :meth:`held`.

        Returns:
            Whether anything was, be it the end.

        Raises:
            MigrationdError: As :meth:`run`.
        """
        count = self._channel.recv_now(self._decoder.free_view())
        if count < 0:
            return False
        self._place(count)
        return True

    def place_early(self) -> None:
        """Place what had been received when this was made; raises as :meth:`run`."""
        data, self._early = self._early, b""
        if data:
            self._decoder.free_view()[: len(data)] = data
            self._place(len(data))

    @property
    def input_fd(self) -> int:
        """What to wait for, inside :meth:`held`; there may be pages without it at first."""
        return self._channel.input_fd

    def held(self) -> AbstractContextManager[None]:
        """Nothing closes the channel inside the block.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        return self._channel.held()

    def wait_left(self) -> None:
        """Wait until the thread that places them does so no more; raises as :meth:`run`."""
        self._left.wait()
        if self._error is not None:
            raise self._error

    def leave(self, error: Exception | None = None) -> None:
        """Place no more on this thread.

        Args:
            error: Why not.
        """
        self._error = error
        self._left.set()

    def _place(self, count: int) -> None:
        decoder = self._decoder
        if not count:
            decoder.ended()
            self.is_ended = True
            return
        for page in decoder.received(count):
            source = self._begin + page.at if page.at >= 0 else -1
            self._blocks[page.block].place_page(page.page, source)
        decoder.done()
        self.is_ended = decoder.is_ended

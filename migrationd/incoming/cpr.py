"""The memory of a guest that comes by cpr-transfer, before its stream.

Reference: stream format 6.10.
"""

import asyncio
from typing import Protocol

from migrationd.codec.cpr import CPR_LIMIT_BYTES, ENTRY_LIMIT, decode_cpr_state
from migrationd.guest.handed import HandedMemory
from migrationd.incoming.berth import Berth
from migrationd.linux.scm_rights import close_all
from migrationd.transport.cpr_channel import CprListener


class CprBerth(Berth, Protocol):
    """Room for a guest whose memory is there before its stream."""

    def take(self, handed: HandedMemory) -> None:
        """Take the memory, owned from now on; may block.

        Raises:
            GuestError: It does not fit; nothing is kept.
        """


class CprArrival:
    """Takes the memory of one source.

    Args:
        listener: Where it comes from; stays open for the next one.
        berth: Where it goes.
    """

    def __init__(self, listener: CprListener, berth: CprBerth) -> None:
        self._listener = listener
        self._berth = berth

    async def arrive(self) -> None:
        """Wait for a source and take its memory; it may connect its stream then.

        Raises:
            ChannelError: It did not send its state.
            StreamError: What it sent is no state.
            GuestError: Its memory does not fit.
        """
        data, fds = await self._listener.receive(CPR_LIMIT_BYTES, ENTRY_LIMIT)
        try:
            state = decode_cpr_state(data)
        except BaseException:
            close_all(fds)
            raise
        await asyncio.to_thread(self._berth.take, HandedMemory(state, fds))
        self.release()

    def release(self) -> None:
        """Let the source go on, which finds out by itself whether it is refused."""
        self._listener.release()

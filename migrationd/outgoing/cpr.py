"""cpr-transfer: memory goes to the destination by its descriptors, before the stream.

The destination closes the cpr channel when the stream may come: it has the memory mapped
by then, and would have refused what does not fit. The guest runs on until the stream
begins, and then stands still for its devices only.

Reference: stream format 6.10.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from migrationd.codec.cpr import CprState, encode_cpr_state
from migrationd.guest.handed import HandedMemory
from migrationd.transport.channel import Channel
from migrationd.transport.cpr_channel import CprSender

OpenChannel = Callable[[], Awaitable[Channel]]


class Offering(Protocol):
    """A guest that can hand its memory over."""

    def offer_memory(self) -> HandedMemory:
        """Its memory; the caller closes it.

        Raises:
            GuestError: It cannot be handed over.
        """


def after_hand_over(guest: Offering, sender: CprSender, open_channel: OpenChannel) -> OpenChannel:
    """What hands the guest's memory over and then opens the main channel.

    Further calls open further channels only.

    Args:
        guest: Whose memory it is.
        sender: Connected cpr channel; closed afterwards.
        open_channel: Opens a channel of the stream.
    """
    is_done = False

    async def open_next() -> Channel:
        nonlocal is_done
        if not is_done:
            await _hand_over(guest, sender)
            is_done = True
        return await open_channel()

    return open_next


async def _hand_over(guest: Offering, sender: CprSender) -> None:
    try:
        handed = await asyncio.to_thread(guest.offer_memory)
        try:
            state = CprState(handed.state.entries, handed.state.plain_tail)
            await sender.hand_over(encode_cpr_state(state), handed.fds)
        finally:
            handed.close()
    finally:
        sender.close()

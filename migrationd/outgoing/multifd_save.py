"""The ``ram`` handler of a migration with multifd: what stays on the main connection.

    per round    START { list SYNC FLUSH EOS }  PART { pages SYNC FLUSH EOS }  END { EOS }
    per section  START { list SYNC EOS }        PART { pages SYNC EOS }        END { SYNC EOS }

SYNC is a packet on every channel. Pages are on the channels; zero pages stand in the PART
where the destination may not know them in packets.

Reference: stream format 3.5 and 3.6.
"""

from collections.abc import Sequence

import numpy as np

from migrationd.codec.ram_encode import encode_multifd_flush
from migrationd.guest.memory import Pages
from migrationd.guest.ram_block import RamBlock
from migrationd.outgoing.multifd_send import MultifdSender
from migrationd.outgoing.ram_save import RamSaver

SCAN_PAGES = 1 << 18
"""Pages of a block that are handed out in one go."""


class MultifdSaver:
    """Sends RAM over the channels of a sender; used by the outgoing thread only.

    Args:
        ram: The handler of the main connection; must not end a PART by itself.
        sender: The channels.
        blocks: RAM blocks in the order of the block list.
        flush_after_each_section: Whether the end of each body is a synchronisation point.
        zeros_on_main: Whether zero pages go over the main connection.
    """

    def __init__(
        self,
        ram: RamSaver,
        sender: MultifdSender,
        blocks: Sequence[RamBlock],
        *,
        flush_after_each_section: bool,
        zeros_on_main: bool,
    ) -> None:
        self._ram = ram
        self._sender = sender
        self._blocks = blocks
        self._is_per_section = flush_after_each_section
        self._zeros_on_main = zeros_on_main
        self._mark = b"" if flush_after_each_section else encode_multifd_flush()

    def setup_bytes(self) -> bytes:
        """START, after its SYNC went out.

        Raises:
            ChannelClosed: A channel broke or was shut down.
        """
        self._sender.sync()
        return self._ram.setup_bytes(self._mark)

    def end_bytes(self) -> bytes:
        """END, after its SYNC where it is a synchronisation point.

        Raises:
            ChannelClosed: A channel broke or was shut down.
        """
        if self._is_per_section:
            self._sender.sync()
        return self._ram.end_bytes()

    def save_all(self) -> None:
        """Send every page of every block once.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        self.begin_parts()
        for block in self._blocks:
            if block.is_elsewhere:
                continue
            for start in range(0, block.page_count, SCAN_PAGES):
                present = block.present[start : start + SCAN_PAGES]
                self.send(block, np.flatnonzero(~present) + start, is_zero=True)
                self.send(block, np.flatnonzero(present) + start, is_zero=False)
        self.end_parts()

    def begin_parts(self) -> None:
        """Begin a round."""
        self._ram.begin_parts()
        self._sender.begin_round()

    def send(self, block: RamBlock, pages: Pages, *, is_zero: bool) -> None:
        """Hand pages of a block to the channels; waits while they have enough.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        if is_zero and self._zeros_on_main:
            self._ram.send(block, pages, is_zero=True)
        else:
            self._sender.put(block, pages, is_zero=is_zero)

    def end_parts(self) -> None:
        """End a round: all its pages are on their way, and no later one overtakes them.

        Raises:
            MigrationdError: The first failure of any channel.
        """
        self._sender.end_round()
        self._sender.sync()
        self._ram.end_parts(self._mark)

"""The channel of urgent pages at the destination: one thread that places what comes.

A parked guest never waits for a page, so it asks for none and QEMU sends none here; but a
source may, and what it sent here it does not send again on the main channel. That is also
why a channel that never comes costs nothing.

Reference: stream format 6.5.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from migrationd.codec.preempt import PreemptDecoder
from migrationd.codec.ram import RamDecoder
from migrationd.codec.records import RamEos
from migrationd.codec.urgent import UrgentDecoder
from migrationd.errors import ConnectFailed, MigrationdError, MigrationError, StreamCorrupt
from migrationd.guest.ram_block import RamBlock
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.incoming.pages import place_record
from migrationd.incoming.urgent_pages import UrgentPages
from migrationd.linux.priority import urgent_thread
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

EOS_WAIT_S = 5.0
"""Longest wait for the EOS of a machine type that sends one behind the main stream's end."""

_FIRST_BYTES = 4096

Blocks = tuple[RamDecoder | None, tuple[RamBlock, ...]]


class PreemptReceiver:
    """Awaits one channel and reads it until it ends; lives on the event loop.

    Args:
        accept: Waits for the channel, which is closed by its owner.
        blocks: Gives the decoder and the blocks once the main stream has brought them; called
            on the reading thread when the first bytes are there.
        on_error: Called on the event loop when pages of this channel may have been lost.
        serve: Places the pages of a running guest where its faults are read, as long as they
            are; called on the reading thread.

    Attributes:
        error: Why it broke; None while it did not.
    """

    def __init__(
        self,
        accept: Callable[[], Awaitable[Channel]],
        blocks: Callable[[], Blocks],
        on_error: Callable[[], None],
        serve: Callable[[UrgentPages], None],
    ) -> None:
        self._accept = accept
        self._blocks = blocks
        self._on_error = on_error
        self._serve_pages = serve
        self._channel: Channel | None = None
        self._is_stopping = False
        self.error: MigrationdError | None = None
        self._task = asyncio.create_task(self._serve())

    async def finish(self, *, sends_eos: bool) -> None:
        """End the channel after the main stream has ended well.

        Args:
            sends_eos: Whether its EOS is still to come: the source must not find the channel
                closed before it wrote that.

        Raises:
            MigrationdError: The channel had broken.
        """
        if self._channel is None:
            log.info("the source made no preempt channel")
        elif sends_eos:
            await asyncio.wait((self._task,), timeout=EOS_WAIT_S)
        await self.stop()
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        """End the channel at once."""
        self._is_stopping = True
        if self._channel is not None:
            self._channel.shutdown()
        else:
            self._task.cancel()
        await asyncio.wait((self._task,))

    async def _serve(self) -> None:
        try:
            self._channel = channel = await self._accept()
        except ConnectFailed as error:
            log.debug("no preempt channel: %s", error)
            return
        if self._is_stopping:
            channel.shutdown()
        executor = ThreadPoolExecutor(1, thread_name_prefix="preempt")
        try:
            await asyncio.get_running_loop().run_in_executor(executor, self._read, channel)
        except Exception as error:  # a defect of ours must end as a lost channel
            if self._is_stopping:
                return
            if isinstance(error, MigrationdError):
                self.error = error
            else:
                log.error("internal error on the preempt channel", exc_info=error)
                self.error = MigrationError(f"internal error: {error!r}")
            self._on_error()
        finally:
            channel.shutdown()
            executor.shutdown(wait=False)

    def _read(self, channel: Channel) -> None:
        scratch = bytearray(_FIRST_BYTES)
        count = channel.recv_into(memoryview(scratch), None)
        if not count:
            return
        ram, blocks = self._blocks()
        if ram is None:
            raise StreamCorrupt("a page before the RAM block list", section="preempt channel")
        if all(isinstance(block, WorkloadBlock) for block in blocks):
            workload_blocks = [block for block in blocks if isinstance(block, WorkloadBlock)]
            urgent = UrgentDecoder(ram.blocks, ram.page_size)
            pages = UrgentPages(channel, urgent, workload_blocks, bytes(scratch[:count]))
            with urgent_thread():
                pages.place_early()
                self._serve_pages(pages)
                pages.run()
            return
        decoder = PreemptDecoder(ram)
        decoder.feed(memoryview(scratch)[:count])
        while True:
            while (record := decoder.next_record()) is not None:
                if isinstance(record, RamEos):
                    return
                place_record(blocks[record.block], record, decoder.position)
            count = channel.recv_into(decoder.receive_view(), None)
            if not count:
                decoder.feed_eof()
                return
            decoder.received(count)

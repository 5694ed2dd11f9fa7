"""``background-snapshot``: the state of a guest at one instant, which goes on running meanwhile.

    set-up    head of the stream, block list
    instant   the guest stands still: its devices are saved, its memory is frozen
    RAM       every page once, as it was; no END, for nothing was sent before the instant
    devices   as they were

The guest stays here: nothing is handed over, and nothing that fails is its affair. A parked
guest is at its instant all the time.

Reference: stream format 6.7; QEMU's events are active, STOP, RESUME, completed.
"""

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np

from migrationd.errors import MigrationCancelled
from migrationd.guest.base import Live
from migrationd.guest.instant import MemoryAtInstant, Piece
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.status import Cause
from migrationd.outgoing.device_save import stream_tail
from migrationd.outgoing.file_save import FileSettings
from migrationd.outgoing.phases import Phases
from migrationd.outgoing.ram_save import RamSaver


class SnapshotPhases(Phases):
    """What one background snapshot sends; as :class:`Phases`, but the guest stays."""

    has_switchover = False
    outlives_guest = True
    _memory: MemoryAtInstant | None = None

    async def send(self) -> None:
        """The stream from its first to its last byte, phase by phase."""
        self._guest.check_unchanged()
        if self._guest.live is not None:
            self._memory = self._guest.live.memory_at_instant()
        if self._settings.file is not None:
            await self._send_file(self._settings.file)
        else:
            await self._send_stream()

    async def complete(self) -> None:
        """Everything is written; the guest is here, as before."""
        await self.unthrottle()
        if not self._status.can(Cause.SAVED):
            raise MigrationCancelled("cancelled")
        self.progress.mark_end()
        self._status.advance(Cause.SAVED)

    async def unthrottle(self) -> None:
        """Let the guest write what it likes, however it ended."""
        memory, self._memory = self._memory, None
        if memory is not None:
            await self._connection.on_thread(memory.close)

    async def _send_stream(self) -> None:
        saver = await self._set_up()
        assert isinstance(saver, RamSaver)  # the capability excludes multifd
        on_thread = self._connection.on_thread
        if self._memory is None:
            await on_thread(saver.save_all)
        else:
            await self._reach_instant()
            await on_thread(send_pieces, saver, self._guest.ram, self._memory.pieces())
        tail = stream_tail(self._guest, self._dialect, b"")
        await on_thread(self._write, tail)

    async def _send_file(self, settings: FileSettings) -> None:
        save = self._savers.file(self._connection, settings)
        self._stats.dirty_sync_count = 1
        on_thread = self._connection.on_thread
        await on_thread(save.set_up)
        self.progress.mark_set_up()
        self._advance(Cause.STREAM)
        if self._memory is None:
            await on_thread(save.save_ram)
        else:
            await self._reach_instant()
            await on_thread(save.save_pieces, self._memory.pieces())
        await on_thread(save.switch_over)

    async def _reach_instant(self) -> None:
        live, memory = self._guest.live, self._memory
        assert live is not None
        assert memory is not None
        await self._connection.on_thread(memory.arm)
        loop = asyncio.get_running_loop()
        await self._connection.on_thread(self._be_still, live, memory, loop)

    def _be_still(
        self, live: Live, memory: MemoryAtInstant, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Stop the guest for as long as it takes to save its devices."""
        with live.run_state_held():
            begin_s = self._clock.monotonic_s()
            with self._held_still(live, loop) as was_running:
                memory.freeze()
                live.save_devices(was_running=was_running)
            self.progress.mark_still(begin_s, self._clock.monotonic_s())


def send_pieces(saver: RamSaver, blocks: Sequence[RamBlock], pieces: Iterator[Piece]) -> None:
    """Send pages as they were, those that are zero as such.

    Args:
        saver: Puts pages on the wire.
        blocks: The guest's blocks.
        pieces: What they held.

    Raises:
        ChannelClosed: The peer went away, or the channel was shut down.
    """
    saver.begin_parts()
    for piece in pieces:
        block = blocks[piece.block]
        if piece.content is None:
            saver.send(block, piece.pages, is_zero=True)
            continue
        words = piece.content.view(np.uint64)
        is_full = np.bitwise_or.reduce(words, axis=1)[piece.rows].astype(np.bool_)
        saver.send(block, piece.pages[~is_full], is_zero=True)
        copied = piece.content.reshape(-1), piece.rows[is_full]
        saver.send(block, piece.pages[is_full], is_zero=False, copied=copied)
    saver.end_parts()

"""COLO, the primary's side: a workload runs here, and a replica elsewhere follows it.

    an ordinary stream   but the guest goes on here when the replica is whole
    colo                 every ``x-checkpoint-delay`` it stands still for one checkpoint
    completed            ``x-colo-lost-heartbeat``: the replica is given up

The guest never leaves. A replica that is lost, hangs or lies costs a pause of at most
``ANSWER_WAIT_S``; the user then says which side goes on.

Reference: stream format 6.8; QEMU 11.1's statuses and COLO_EXIT.
"""

import asyncio
import functools
import logging

from migrationd.codec.colo import (
    MESSAGE_BYTES,
    ColoMessage,
    encode_message,
    encode_size,
    name_of,
)
from migrationd.codec.command import encode_command
from migrationd.codec.constants import MIG_CMD_ENABLE_COLO
from migrationd.codec.encode import StreamEncoder
from migrationd.codec.records import Command, EndOfStream
from migrationd.errors import (
    ChannelClosed,
    ChannelError,
    MigrationError,
    StreamCorrupt,
    StreamError,
)
from migrationd.guest.base import Live
from migrationd.migration.status import Cause
from migrationd.outgoing.device_save import full_sections
from migrationd.outgoing.live_save import LiveSaver
from migrationd.outgoing.phases import Phases
from migrationd.outgoing.ram_save import RamSaver

log = logging.getLogger(__name__)

ANSWER_WAIT_S = 5.0
"""A replica that has not answered by then is lost."""

_EOF = StreamEncoder().encode(EndOfStream())


class ColoPhases(Phases):
    """What a primary sends; as :class:`Phases`, but the guest stays."""

    keeps_guest = True
    _said = b""

    @functools.cached_property
    def _lost(self) -> asyncio.Event:
        """Set when the replica is given up."""
        return asyncio.Event()

    async def send(self) -> None:
        """The stream, then checkpoint after checkpoint until it is told to end."""
        live = self._guest.live
        if live is None:
            raise MigrationError("only a guest that executes here can have a replica")
        if self.postcopy is not None:
            raise MigrationError("x-colo goes without postcopy-ram")
        saver = await self._set_up()
        if not isinstance(saver, RamSaver):
            raise MigrationError("x-colo goes without xbzrle")
        await self._save_ram(saver)
        assert self._live_saver is not None
        await self._pause_before_switchover()
        self.progress.mark_switchover()
        self._advance(Cause.SWITCHOVER)
        await self._switch_over(saver)
        self._said = await self._connection.wait_confirmed()
        await self._connection.on_thread(self._expect, ColoMessage.CHECKPOINT_READY)
        if self._was_running:
            await self._connection.on_thread(live.start)
            self._observer.on_resumed()
        self._observer.let_go()
        self._advance(Cause.REPLICATE)
        try:
            await self._replicate(saver, live, self._live_saver)
        except (ChannelError, StreamError) as error:
            self._connection.check()
            log.error("the replica is lost: %s; the guest goes on here", error)
            self.progress.error = error
            self._observer.on_colo_exit("error")
            await self._lost.wait()
            self._connection.check()
        else:
            self._connection.check()
            self._observer.on_colo_exit("request")

    async def complete(self) -> None:
        """The replica is given up; the guest is here, as before."""
        self.progress.mark_end()
        self._status.advance(Cause.COMPLETE)

    def interrupt(self) -> None:
        """As :class:`Phases`; also ends a wait for the end of a replica."""
        super().interrupt()
        self._lost.set()

    def give_up_replica(self) -> None:
        """``x-colo-lost-heartbeat``: the guest goes on here, alone."""
        self._lost.set()

    def _advise(self) -> bytes:
        return encode_command(Command(MIG_CMD_ENABLE_COLO, b""))

    async def _replicate(self, saver: RamSaver, live: Live, live_saver: LiveSaver) -> None:
        loop = asyncio.get_running_loop()
        channel = self._connection.channel

        def checkpoint() -> None:
            self._write(encode_message(ColoMessage.CHECKPOINT_REQUEST))
            self._expect(ColoMessage.CHECKPOINT_REPLY)
            with self._held_still(live, loop) as was_running:
                self._send_state(saver, live, live_saver, was_running=was_running)

        while not self._lost.is_set():
            await self._connection.on_thread(checkpoint)
            lost = asyncio.create_task(self._lost.wait())
            spoken = asyncio.create_task(channel.wait_readable())
            delay_s = self.checkpoint_delay_ms / 1000
            try:
                await asyncio.wait(
                    (lost, spoken), timeout=delay_s, return_when=asyncio.FIRST_COMPLETED
                )
                if spoken.done():
                    # Nothing is due from the replica now: it hangs up, or lies.
                    spoken.result()
                    raise ChannelClosed("the secondary hung up between two checkpoints")
            finally:
                for task in (lost, spoken):
                    task.cancel()
                await asyncio.gather(lost, spoken, return_exceptions=True)

    def _send_state(
        self, saver: RamSaver, live: Live, live_saver: LiveSaver, *, was_running: bool
    ) -> None:
        """One checkpoint of the stopped guest; on the sending thread."""
        self._write(encode_message(ColoMessage.VMSTATE_SEND))
        live_saver.send_written()
        self._write(saver.end_bytes() + _EOF)
        live.save_devices(was_running=was_running)
        devices = b"".join(full_sections(self._guest, self._dialect))
        self._write(encode_size(len(devices + _EOF)) + devices + _EOF)
        self._expect(ColoMessage.VMSTATE_RECEIVED)
        self._expect(ColoMessage.VMSTATE_LOADED)
        self._stats.dirty_sync_count += 1

    def _expect(self, message: ColoMessage) -> None:
        """Wait for one message; on the sending thread.

        Raises:
            ChannelError: It does not come.
            StreamCorrupt: Another one does.
        """
        data, self._said = bytearray(self._said), b""
        deadline_s = self._clock.monotonic_s() + ANSWER_WAIT_S
        while len(data) < MESSAGE_BYTES:
            view = bytearray(MESSAGE_BYTES - len(data))
            left_s = max(0.0, deadline_s - self._clock.monotonic_s())
            try:
                count = self._connection.channel.recv_into(memoryview(view), left_s)
            except TimeoutError:
                raise ChannelError("the secondary does not answer") from None
            if not count:
                raise ChannelClosed("the secondary closed the connection")
            data += view[:count]
        self._said = bytes(data[MESSAGE_BYTES:])
        number = int.from_bytes(data[:MESSAGE_BYTES], "big")
        if number != message:
            raise StreamCorrupt(
                f"the secondary says {name_of(number)}, not {message.name}", section="COLO"
            )

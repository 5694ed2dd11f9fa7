"""Postcopy out of a held guest: the switch, the push, and a new connection after a lost one.

    [preempt channel]  SWITCHOVER_START  END of other handlers  RAM_DISCARD...  PING 2
    PACKAGED { LISTEN  devices  PING 3  PING 0x42  RUN }  PING 4
    SECTION_PART ram { pages }  SECTION_END ram  EOF              preempt: pages

After the package the destination runs the guest, and nobody else may. Whether it was loaded
is known with the answer to PING 0x42. What is lost between the two leaves a guest that is
*paused*: the destination can go on with it, or a person who knows that the destination does
not run it can take it back.

Reference: stream format 6.4-6.6.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from migrationd.codec.postcopy import (
    PING_PACKAGE_LOADED,
    bitmap_bytes,
    encode_recv_bitmap,
    encode_resume,
    unpack_received,
)
from migrationd.codec.ram_encode import encode_eos
from migrationd.codec.return_path import (
    Pong,
    RecvBitmap,
    ResumeAck,
    ReturnPathMessage,
    SwitchoverAck,
)
from migrationd.errors import ChannelError, StreamCorrupt
from migrationd.outgoing.postcopy_pacer import Shares
from migrationd.outgoing.postcopy_server import Push, RequestServer
from migrationd.outgoing.postcopy_source import MakeSaver, PostcopySource
from migrationd.outgoing.postcopy_writer import PageWriter
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

SEND_QUEUE_BYTES = 128 << 10
"""What may lie in the kernel before a requested page on the same channel."""

OpenChannel = Callable[[], Awaitable[Channel]]


class PostcopyLink:
    """One connection of a postcopy migration: its channels and threads.

    Lives on the event loop. The return path is read by a thread from the first byte on.

    Args:
        source: What outlives the connection.
        channel: Main channel; not owned.
        open_channel: Opens another connection to the same destination.
        executor: Runs what blocks; has room for three.
        on_loaded: Called on the loop when the destination has loaded the package.
        on_pong: Called on the loop with the number of each PING that was answered.
        is_recovery: Whether the connection is a new one for a paused guest.
    """

    def __init__(
        self,
        source: PostcopySource,
        channel: Channel,
        open_channel: OpenChannel,
        executor: ThreadPoolExecutor,
        on_loaded: Callable[[], None],
        on_pong: Callable[[int], None],
        *,
        is_recovery: bool,
    ) -> None:
        self._source = source
        self._channel = channel
        self._open_channel = open_channel
        self._executor = executor
        self._on_loaded = on_loaded
        self._on_pong = on_pong
        self._loop = asyncio.get_running_loop()
        self.has_switchover_ack = False
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._preempt: Channel | None = None
        self._package_end: int | None = None
        self._is_prefetching = False
        self._is_acknowledged = False
        self._first_pong = asyncio.Event()
        self._answers: asyncio.Queue[RecvBitmap | ResumeAck] = asyncio.Queue()
        blocks = source.guest.ram
        self._main = PageWriter(channel, blocks, source.schedule, source.guest.page_size)
        self._urgent = self._main
        largest = max((block.page_count for block in blocks), default=0)
        self._server = RequestServer(
            channel,
            blocks,
            source.schedule,
            source.stats,
            source.latency,
            source.requests,
            bitmap_limit_bytes=bitmap_bytes(largest) if is_recovery else 0,
            on_message=self._on_message,
            may_end=self._ending.is_set,
        )

    @property
    def may_run_there(self) -> bool:
        """Whether the destination has all that it needs to run the guest."""
        return self._package_end is not None and self._channel.bytes_sent >= self._package_end

    def set_ending(self) -> None:
        """The last byte of the stream is on its way: SHUT 0 may come."""
        self._ending.set()

    def expect_answer(self) -> None:
        """A PING is on its way that is none of the postcopy's own."""
        self._server.expected += 1

    async def read(self) -> None:
        """Read the return path to SHUT 0; raises as :meth:`RequestServer.run`."""
        await self._loop.run_in_executor(self._executor, self._server.run)

    def shutdown(self) -> None:
        """End every blocked call; any number of times."""
        self._stop.set()
        if self._preempt is not None:
            self._preempt.shutdown()

    def close(self) -> None:
        """Close what was opened here, after the threads have ended."""
        self.shutdown()
        if self._preempt is not None:
            self._preempt.close()

    async def set_up(self) -> None:
        """Open the preempt channel where the destination reads nothing before it exists.

        Raises:
            ChannelError: It cannot be opened.
        """
        if self._source.settings.preempt and self._source.dialect.preempt_at_setup:
            await self._open_preempt()

    def prefetch(self) -> None:
        """Have the disk asked for what goes first; not waited for."""
        if not self._is_prefetching:
            self._is_prefetching = True
            self._executor.submit(self._source.prefetch, self._stop)

    async def lead(self, make_saver: MakeSaver) -> None:
        """Send what the guest asks for first, for a short while; before :meth:`switch`.

        Raises:
            ChannelError: The channel broke.
        """
        await self._run(self._source.lead, make_saver, self._stop)

    async def switch(self) -> None:
        """Send what makes the destination run the guest; requests are answered from here on.

        Raises:
            ChannelError: A channel broke. :attr:`may_run_there` says what that means.
        """
        if self._source.settings.preempt and self._preempt is None:
            await self._first_pong.wait()  # or this connection might be taken for the main one
            await self._open_preempt()
        await self._run(self._send_switch)
        self._note_loaded()

    def _send_switch(self) -> None:
        package, lead = self._source.switch_bytes()
        self._channel.limit_send_queue(SEND_QUEUE_BYTES)
        self._package_end = self._channel.bytes_sent + len(package)
        self._source.stats.sent(len(package) + len(lead))
        self._server.writer = self._urgent
        self._main.open(package + lead)
        self._source.continue_counting()

    async def recover(self) -> None:
        """Ask the destination what it has, and tell it to go on.

        Raises:
            ChannelError: A channel broke or cannot be opened.
            StreamCorrupt: The destination's answers do not fit the guest.
        """
        source = self._source
        await self.set_up()
        question = b"".join(encode_recv_bitmap(block.idstr) for block in source.guest.ram)
        await self._run(self._channel.send, question)
        for index, block in enumerate(source.guest.ram):
            answer = await self._answers.get()
            if not isinstance(answer, RecvBitmap) or answer.idstr != block.idstr:
                raise StreamCorrupt(
                    f"expected the received pages of '{block.idstr}', found "
                    f"{type(answer).__name__} {getattr(answer, 'idstr', '')}".rstrip(),
                    section="return path",
                )
            received = unpack_received(block.idstr, answer.bitmap, block.page_count)
            source.schedule.adopt_received(index, received)
        if source.settings.preempt and self._preempt is None:
            await self._open_preempt()
        self._package_end = 0
        await self._run(self._send_resume)
        await self._answers.get()

    def _send_resume(self) -> None:
        self._channel.limit_send_queue(SEND_QUEUE_BYTES)
        self._channel.send(encode_resume())

    async def push(self) -> None:
        """Send all that is left, and the end of the stream.

        Raises:
            ChannelError: A channel broke.
        """
        source = self._source
        source.plan()
        push = Push(
            self._main,
            source.schedule,
            source.stats,
            source.pacer,
            source.gives_way,
            source.requests,
            source.clock,
            self._stop,
            shares=Shares(has_own_channel=self._preempt is not None),
            # A destination of this dialect reads the preempt channel up to its EOS only, and
            # newer programs wait for every page that was asked for before.
            with_zeros=self._preempt is not None and source.dialect.preempt_eos,
        )
        self.prefetch()
        await self._run(push.run)
        self._stop.set()
        self.set_ending()
        await self._run(self._main.finish, source.end_bytes())
        if self._preempt is not None and source.dialect.preempt_eos:
            await self._run(self._urgent.finish, encode_eos())

    async def _open_preempt(self) -> None:
        channel = await self._open_channel()
        self._preempt = channel
        if not channel.is_socket:
            raise ChannelError("Migration requires multi-channel URIs (e.g. tcp)")
        source = self._source
        self._urgent = PageWriter(
            channel, source.guest.ram, source.schedule, source.guest.page_size
        )
        self._urgent.open(b"")

    async def _run(self, call: Callable[..., object], *arguments: object) -> None:
        await self._loop.run_in_executor(self._executor, call, *arguments)

    def _on_message(self, message: ReturnPathMessage) -> None:
        """On the server's thread; what the next request depends on is done before it is read."""
        if isinstance(message, ResumeAck):
            if message.value != 1:
                raise StreamCorrupt(
                    f"RESUME_ACK {message.value}, expected 1", section="return path"
                )
            if self._package_end != 0 or self._server.writer is not None:
                raise StreamCorrupt("RESUME_ACK without RESUME", section="return path")
            self._main.open(self._source.part_bytes())
            self._server.writer = self._urgent
        elif isinstance(message, RecvBitmap) and self._server.writer is not None:
            raise StreamCorrupt(
                f"received-page bitmap of {len(message.bitmap)} bytes outside a recovery",
                section="return path",
                block=message.idstr,
            )
        self._loop.call_soon_threadsafe(self._take, message)

    def _note_loaded(self) -> None:
        """The answer may be here before the thread that sent the package has counted it."""
        if self._is_acknowledged and self.may_run_there:
            self._source.is_loaded = True
            self._on_loaded()

    def _take(self, message: ReturnPathMessage) -> None:
        match message:
            case Pong(value=value):
                self._first_pong.set()
                self._on_pong(value)
                if value == PING_PACKAGE_LOADED and self._package_end is not None:
                    self._is_acknowledged = True
                    self._note_loaded()
            case SwitchoverAck():
                self.has_switchover_ack = True
            case RecvBitmap() | ResumeAck():
                self._answers.put_nowait(message)
            case _:
                pass

"""One connected client of a monitor: what it sends, what it gets, and in which order.

Commands run one at a time in their order; those sent out of band overtake them. While
a client does not read its replies no command of it runs, and one that lets too much
output pile up, for it does not read its events either, is disconnected.

A command that has nothing to wait for is performed where its bytes are read, without a
task: that is most of a monitor's speed.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from migrationd.errors import QMPError
from migrationd.qmp.connection import Connection
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.fds import FdTable, PassedFds, RequestFds
from migrationd.qmp.json_reader import JsonError, JsonReader, JsonValue
from migrationd.qmp.message import encode_message
from migrationd.qmp.session import OOB, UNSET, Session, failure
from migrationd.qmp.version import VERSION

log = logging.getLogger(__name__)

Reply = dict[str, object]
Dispatch = Callable[[object, Session, RequestFds], Reply | Awaitable[Reply]]
"""Performs a request and returns the reply, at once where it can; raises nothing."""

OUTPUT_LIMIT_BYTES = 16 << 20
"""A client that lets this much output pile up is disconnected."""

OUTPUT_HIGH_BYTES = 256 << 10
"""No further command of a client runs while more than this waits for it."""

QUEUE_LIMIT = 8
"""Commands that wait while out-of-band execution is on; without it none does."""

SLICE_BYTES = 4096
TURN_COMMANDS = 8
"""Input and commands before other clients and tasks get their turn."""

SEND_BYTES = 256 << 10
DRAIN_S = 0.5


@dataclass(slots=True)
class _Queued:
    """A request, or what was wrong with its form, and the descriptors that came with it."""

    item: JsonValue | JsonError
    passed: PassedFds


class MonitorClient:
    """One client.

    Args:
        connection: Its bytes; closed at the end.
        dispatch: What performs requests, once it is there.
        bus: Events.
        fds: Named descriptors of the monitor.
        running: Commands that run; they outlive the client.
        is_pretty: Whether output is spread over several lines.
    """

    def __init__(
        self,
        connection: Connection,
        dispatch: "asyncio.Future[Dispatch]",
        bus: EventBus,
        fds: FdTable,
        running: "set[asyncio.Future[None]]",
        *,
        is_pretty: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._dispatch = dispatch
        self._bus = bus
        self._fds = fds
        self._running = running
        self._is_pretty = is_pretty
        self._session = Session(VERSION, (OOB,))
        self._reader = JsonReader()
        self._passed = PassedFds([])
        self._input = memoryview(b"")
        self._read: deque[_Queued] = deque()
        self._waiting: deque[_Queued] = deque()
        self._is_busy = False
        self._in_turn = False
        self._has_turn = False
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._is_flush_due = False
        self._drained = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._is_gone = False

    async def serve(self) -> None:
        """Talk to the client until it goes."""
        self._queue(self._session.greeting())
        try:
            self._connection.watch_input(self._on_input)
            await self._ended
        finally:
            self._end()
            self._bus.detach(self._queue)
            self._connection.watch_input(None)
            self._passed.release()
            for queued in (*self._read, *self._waiting):
                queued.passed.release()
            self._read.clear()
            self._waiting.clear()
            try:
                await self._drain()
            finally:
                self._is_gone = True
                self._connection.close()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def _drain(self) -> None:
        """Let what is queued go out, but do not wait for a client that does not read."""
        self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._output_bytes:
                    self._drained.clear()
                    await self._drained.wait()

    def _on_input(self) -> None:
        if not self._receive():
            return
        self._turn()
        # Of a client that sent something and has gone uvloop tells only once.
        if self._wants_input and not self._ended.done() and self._receive():
            self._connection.watch_input(None)
            self._turn_later()

    def _receive(self) -> bool:
        """Take what is there; False if that is nothing, or the end."""
        try:
            data, fds = self._connection.recv()
        except BlockingIOError:
            return False
        if not data:
            self._end()
            return False
        if fds:
            self._passed.release()
            self._passed = PassedFds(fds)
        self._input = memoryview(data)
        return True

    @property
    def _wants_input(self) -> bool:
        """Whether all that was read has at least its place."""
        return not self._read and not self._input and self._has_place

    def _turn(self) -> None:
        """Do what can be done now, but leave others their share."""
        self._has_turn = False
        self._in_turn = True
        try:
            self._perform()
        except BaseException:
            self._end()  # a defect of ours must not leave the next client waiting
            raise
        finally:
            self._in_turn = False
        if not self._ended.done():
            self._connection.watch_input(self._on_input if self._wants_input else None)
        self._flush()

    def _perform(self) -> None:
        is_sliced = False
        commands = TURN_COMMANDS
        while not self._ended.done():
            if self._waiting and not self._is_busy and self._may_run():
                if not commands:
                    self._turn_later()
                    break
                commands -= 1
                self._start(self._waiting.popleft(), in_band=True)
            elif self._read:
                if self._session.is_oob(self._read[0].item):
                    self._start(self._read.popleft(), in_band=False)
                elif self._has_place:
                    self._waiting.append(self._read.popleft())
                else:
                    break
            elif self._input:
                if is_sliced:
                    self._turn_later()
                    break
                is_sliced = True
                self._parse()
            else:
                break

    def _turn_later(self) -> None:
        if not self._has_turn:
            self._has_turn = True
            self._loop.call_soon(self._turn)

    @property
    def _has_place(self) -> bool:
        """Whether a further command may wait."""
        if self._session.allows_oob:
            return len(self._waiting) < QUEUE_LIMIT
        return not self._waiting and not self._is_busy

    def _may_run(self) -> bool:
        if self._output_bytes > OUTPUT_HIGH_BYTES:
            return False  # until the client has read
        if not self._dispatch.done():
            self._dispatch.add_done_callback(lambda _: self._turn_later())
            return False
        return True

    def _parse(self) -> None:
        piece = bytes(self._input[:SLICE_BYTES])
        self._input = self._input[SLICE_BYTES:]
        items = self._reader.feed(piece)
        self._read.extend(_Queued(item, self._passed.hold()) for item in items)
        if items and not self._input and self._reader.is_between_values:
            # They cannot belong to anything that is still to come.
            self._passed.release()
            self._passed = PassedFds([])

    def _start(self, queued: _Queued, *, in_band: bool) -> None:
        """Perform a command; one that waits runs to its end even when the client goes."""
        was_negotiated = self._session.is_negotiated
        if isinstance(queued.item, JsonError):
            queued.passed.release()
            self._queue(failure(UNSET, QMPError(queued.item.text)))
            return
        fds = RequestFds(self._fds, queued.passed)
        try:
            reply = self._dispatch.result()(queued.item.value, self._session, fds)
        except BaseException:
            queued.passed.release()
            raise
        if isinstance(reply, dict):
            queued.passed.release()
            self._answer(reply, was_negotiated)
            return
        self._is_busy = self._is_busy or in_band
        task = asyncio.ensure_future(
            self._wait_for(reply, queued.passed, was_negotiated, in_band=in_band)
        )
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _wait_for(
        self, reply: Awaitable[Reply], passed: PassedFds, was_negotiated: bool, *, in_band: bool
    ) -> None:
        try:
            answer = await reply
        finally:
            passed.release()
            if in_band:
                self._is_busy = False
                self._turn_later()
        self._answer(answer, was_negotiated)

    def _answer(self, reply: Reply, was_negotiated: bool) -> None:
        self._queue(reply)
        if self._session.is_negotiated and not was_negotiated and not self._ended.done():
            self._bus.attach(self._queue)

    def _queue(self, message: dict[str, object]) -> None:
        if self._is_gone:
            return
        data = encode_message(message, is_pretty=self._is_pretty)
        self._output.append(data)
        self._output_bytes += len(data)
        if self._output_bytes > OUTPUT_LIMIT_BYTES:
            log.warning("a monitor client does not read its output: disconnected")
            self._lose_output()
        elif not self._in_turn and not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what can be sent; the rest when there is room."""
        self._is_flush_due = False
        if self._is_gone or not self._output:
            return
        was_high = self._output_bytes > OUTPUT_HIGH_BYTES
        try:
            while self._output:
                data = self._take_output()
                sent = self._connection.send(data)
                self._output_bytes -= sent
                if sent < len(data):
                    self._output.appendleft(data[sent:])
                    break
        except OSError:
            self._lose_output()
        self._connection.watch_output(self._flush if self._output else None)
        if not self._output_bytes:
            self._drained.set()
        if was_high and self._output_bytes <= OUTPUT_HIGH_BYTES:
            self._turn_later()

    def _take_output(self) -> bytes:
        first = self._output.popleft()
        if not self._output:
            return first
        parts = [first]
        size = len(first)
        while self._output and size + len(self._output[0]) <= SEND_BYTES:
            parts.append(self._output.popleft())
            size += len(parts[-1])
        return b"".join(parts)

    def _lose_output(self) -> None:
        """The client cannot get it any more."""
        self._output.clear()
        self._output_bytes = 0
        self._is_gone = True
        self._drained.set()
        self._end()

"""One connected client of a monitor: what it sends, what it gets, and in which order.

Commands run one at a time in their order; those sent out of band overtake them. While
a client does not read its replies no command of it runs, and one that lets too much
output pile up, for it does not read its events either, is disconnected.
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

Dispatch = Callable[[object, Session, RequestFds], Awaitable[dict[str, object]]]
"""Performs a request and returns the reply; raises nothing."""

OUTPUT_LIMIT_BYTES = 16 << 20
"""A client that lets this much output pile up is disconnected."""

OUTPUT_HIGH_BYTES = 256 << 10
"""No further command of a client runs while more than this waits for it."""

QUEUE_LIMIT = 8
"""Commands that wait while out-of-band execution is on; without it none does."""

SLICE_BYTES = 4096
"""Input that is read before other tasks get their turn."""

SEND_BYTES = 256 << 10
DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
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
    """

    def __init__(
        self,
        connection: Connection,
        dispatch: "asyncio.Future[Dispatch]",
        bus: EventBus,
        fds: FdTable,
        running: "set[asyncio.Task[None]]",
    ) -> None:
        self._connection = connection
        self._dispatch = dispatch
        self._bus = bus
        self._fds = fds
        self._running = running
        self._session = Session(VERSION, (OOB,))
        self._requests: asyncio.Queue[_Queued] = asyncio.Queue(QUEUE_LIMIT)
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._has_output = asyncio.Event()
        self._has_room = asyncio.Event()
        self._overrun = asyncio.Event()
        self._is_leaving = False
        self._is_gone = False

    async def serve(self) -> None:
        """Talk to the client until it goes."""
        self._queue(self._session.greeting())
        tasks = [
            asyncio.create_task(work, name=f"monitor {name}")
            for name, work in (
                ("input", self._read()),
                ("commands", self._perform_queued()),
                ("overrun", self._overrun.wait()),
            )
        ]
        writer = asyncio.create_task(self._write(), name="monitor output")
        try:
            await asyncio.wait((*tasks, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_leaving = True
            self._bus.detach(self._queue)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._drain(writer)
            self._is_gone = True
            while not self._requests.empty():
                self._requests.get_nowait().passed.release()
            self._connection.close()

    async def _drain(self, writer: "asyncio.Task[None]") -> None:
        """Let what is queued go out, but do not wait for a client that does not read."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._output_bytes and not writer.done() and not self._overrun.is_set():
                    await self._wait_for_room()
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    async def _read(self) -> None:
        reader = JsonReader()
        passed = PassedFds([])
        try:
            while True:
                data, fds = await self._connection.recv()
                if not data:
                    return
                if fds:
                    passed.release()
                    passed = PassedFds(fds)
                for start in range(0, len(data), SLICE_BYTES):
                    if start:
                        await asyncio.sleep(0)
                    items = reader.feed(data[start : start + SLICE_BYTES])
                    requests = deque(_Queued(item, passed.hold()) for item in items)
                    is_all = start + SLICE_BYTES >= len(data)
                    if items and is_all and reader.is_between_values:
                        # They cannot belong to anything that is still to come.
                        passed.release()
                        passed = PassedFds([])
                    await self._accept(requests)
        finally:
            passed.release()

    async def _accept(self, requests: deque[_Queued]) -> None:
        """Start requests, or let them wait for their turn."""
        try:
            while requests:
                item = requests[0].item
                if isinstance(item, JsonValue) and self._session.is_oob(item.value):
                    self._start(requests.popleft())
                    continue
                await self._requests.put(requests[0])
                requests.popleft()
                if not self._session.allows_oob:
                    await self._requests.join()
        finally:
            for request in requests:
                request.passed.release()

    async def _perform_queued(self) -> None:
        while True:
            queued = await self._requests.get()
            while self._output_bytes > OUTPUT_HIGH_BYTES:
                await self._wait_for_room()
            await asyncio.shield(self._start(queued))
            self._requests.task_done()

    def _start(self, queued: _Queued) -> "asyncio.Task[None]":
        """Begin a command; it runs to its end even when the client goes."""
        task = asyncio.create_task(self._perform(queued), name="monitor command")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _perform(self, queued: _Queued) -> None:
        was_negotiated = self._session.is_negotiated
        try:
            if isinstance(queued.item, JsonError):
                reply = failure(UNSET, QMPError(queued.item.text))
            else:
                dispatch = await asyncio.shield(self._dispatch)
                fds = RequestFds(self._fds, queued.passed)
                reply = await dispatch(queued.item.value, self._session, fds)
        finally:
            queued.passed.release()
        self._queue(reply)
        if self._session.is_negotiated and not was_negotiated and not self._is_leaving:
            self._bus.attach(self._queue)

    async def _write(self) -> None:
        while True:
            while self._output:
                parts = [self._output.popleft()]
                size = len(parts[0])
                while self._output and size + len(self._output[0]) <= SEND_BYTES:
                    parts.append(self._output.popleft())
                    size += len(parts[-1])
                await self._connection.send(b"".join(parts))
                self._output_bytes -= size
                self._has_room.set()
            self._has_output.clear()
            await self._has_output.wait()

    async def _wait_for_room(self) -> None:
        self._has_room.clear()
        await self._has_room.wait()

    def _queue(self, message: dict[str, object]) -> None:
        if self._is_gone or self._overrun.is_set():
            return
        data = encode_message(message)
        self._output.append(data)
        self._output_bytes += len(data)
        self._has_output.set()
        if self._output_bytes > OUTPUT_LIMIT_BYTES:
            log.warning("a monitor client does not read its output: disconnected")
            self._overrun.set()

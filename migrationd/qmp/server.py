"""Monitors: one socket is one monitor with one client at a time.

A second client waits in the backlog until the first has gone, as in QEMU. Output is
bounded: while a client does not read its replies none of its commands run, and one
that does not read its events is disconnected.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable

from migrationd.errors import ConnectFailed, QMPError
from migrationd.qmp.connection import Connection, SocketConnection, StdioConnection
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.fds import FdStore
from migrationd.qmp.json_reader import JsonError, JsonReader
from migrationd.qmp.message import encode_message
from migrationd.qmp.monitor_spec import MonitorSpec
from migrationd.qmp.session import UNSET, Session, failure
from migrationd.qmp.version import VERSION

log = logging.getLogger(__name__)

Dispatch = Callable[[object, Session, FdStore], Awaitable[dict[str, object]]]
"""Performs a request and returns the reply."""

OUTPUT_LIMIT_BYTES = 16 << 20
"""A client that lets this much output pile up is disconnected."""

OUTPUT_HIGH_BYTES = 256 << 10
"""No further command of a client runs while more than this waits for it."""


class _Client:
    """One connected client."""

    def __init__(
        self,
        connection: Connection,
        dispatch: "asyncio.Future[Dispatch]",
        bus: EventBus,
        fds: FdStore,
    ) -> None:
        self._connection = connection
        self._dispatch = dispatch
        self._bus = bus
        self._fds = fds
        self._session = Session(VERSION)
        self._output: deque[bytes] = deque()
        self._output_bytes = 0
        self._has_output = asyncio.Event()
        self._has_room = asyncio.Event()
        self._overrun = asyncio.Event()

    async def serve(self) -> None:
        """Talk to the client until it goes."""
        self._queue(self._session.greeting())
        writer = asyncio.create_task(self._write(), name="monitor output")
        reader = asyncio.create_task(self._read(), name="monitor input")
        overrun = asyncio.create_task(self._overrun.wait(), name="monitor overrun")
        try:
            await asyncio.wait((reader, writer, overrun), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._bus.detach(self._event)
            reader.cancel()
            overrun.cancel()
            await asyncio.gather(reader, overrun, return_exceptions=True)
            await self._drain(writer)
            self._connection.close()

    async def _drain(self, writer: "asyncio.Task[None]") -> None:
        """Let what is queued go out, but do not wait for a client that does not read."""
        deadline = asyncio.get_running_loop().time() + 0.5
        while self._output_bytes and not writer.done():
            if asyncio.get_running_loop().time() > deadline or self._overrun.is_set():
                break
            self._has_room.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_room.wait(), 0.05)
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    async def _read(self) -> None:
        reader = JsonReader()
        while True:
            data, fds = await self._connection.recv()
            if not data:
                self._fds.drop_unclaimed()
                return
            self._fds.arrive(fds)
            for item in reader.feed(data):
                while self._output_bytes > OUTPUT_HIGH_BYTES:
                    self._has_room.clear()
                    await self._has_room.wait()
                if isinstance(item, JsonError):
                    self._queue(failure(UNSET, QMPError(item.text)))
                    continue
                was_negotiated = self._session.is_negotiated
                dispatch = await asyncio.shield(self._dispatch)
                reply = await dispatch(item.value, self._session, self._fds)
                self._fds.drop_unclaimed()
                self._queue(reply)
                if self._session.is_negotiated and not was_negotiated:
                    self._bus.attach(self._event)

    async def _write(self) -> None:
        while not self._overrun.is_set():
            while self._output:
                data = b"".join(self._output)
                self._output.clear()
                await self._connection.send(data)
                self._output_bytes -= len(data)
                self._has_room.set()
            self._has_output.clear()
            await self._has_output.wait()

    def _event(self, event: dict[str, object]) -> None:
        self._queue(event)

    def _queue(self, message: dict[str, object]) -> None:
        if self._overrun.is_set():
            return
        data = encode_message(message)
        self._output.append(data)
        self._output_bytes += len(data)
        self._has_output.set()
        if self._output_bytes > OUTPUT_LIMIT_BYTES:
            log.warning("a monitor client does not read its output: disconnected")
            self._overrun.set()


class MonitorServer:
    """One monitor.

    Args:
        dispatch: What performs requests, once it is there.
        bus: Events.
        spec: Where it listens or connects to.
        inherited: Listening socket from the service manager, if there is one for it.
    """

    def __init__(
        self,
        dispatch: "asyncio.Future[Dispatch]",
        bus: EventBus,
        spec: MonitorSpec,
        inherited: socket.socket | None = None,
    ) -> None:
        self._dispatch = dispatch
        self._bus = bus
        self._spec = spec
        self._listener = inherited
        self._is_inherited = inherited is not None
        self._fds = FdStore()
        self._task: asyncio.Task[None] | None = None
        self._first_client = asyncio.Event()

    async def start(self) -> None:
        """Open the monitor; with ``wait=on`` return when the first client is there.

        Raises:
            ConnectFailed: It cannot be opened.
        """
        spec = self._spec
        if spec.kind == "stdio":
            work = self._serve(StdioConnection())
        elif spec.is_server or self._is_inherited:
            if self._listener is None:
                self._listener = _listen(spec)
            self._listener.setblocking(False)
            work = self._accept(self._listener)
        else:
            work = self._serve(SocketConnection(await _connect(spec)))
        self._task = asyncio.create_task(work, name="monitor")
        if spec.waits and not self._is_inherited:
            await self._first_client.wait()

    async def aclose(self) -> None:
        """Disconnect the client and close the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fds.close_all()
        if self._listener is not None:
            self._listener.close()
            if self._spec.kind == "unix" and not self._is_inherited:
                with contextlib.suppress(OSError):
                    os.unlink(self._spec.path)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("monitor: accept failed: %s", error)
                await asyncio.sleep(0.1)
                continue
            await self._serve(SocketConnection(sock))

    async def _serve(self, connection: Connection) -> None:
        self._first_client.set()
        try:
            await _Client(connection, self._dispatch, self._bus, self._fds).serve()
        except OSError as error:
            log.debug("monitor client lost: %s", error)


def _listen(spec: MonitorSpec) -> socket.socket:
    try:
        if spec.kind == "tcp":
            info = socket.getaddrinfo(
                spec.host or None, spec.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = socket.socket(info[0], socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(info[4])
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.stat(spec.path).st_mode):
                    os.unlink(spec.path)
            old_mask = os.umask(0o077)
            try:
                sock.bind(spec.path)
            finally:
                os.umask(old_mask)
        sock.listen(64)
    except OSError as error:
        place = spec.path or f"{spec.host}:{spec.port}"
        raise ConnectFailed(f"-qmp: cannot listen on '{place}': {error.strerror}") from error
    return sock


async def _connect(spec: MonitorSpec) -> socket.socket:
    family = socket.AF_UNIX if spec.kind == "unix" else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    target = spec.path if spec.kind == "unix" else (spec.host or "127.0.0.1", spec.port)
    try:
        await asyncio.get_running_loop().sock_connect(sock, target)
    except OSError as error:
        sock.close()
        place = spec.path or f"{spec.host}:{spec.port}"
        raise ConnectFailed(
            f"-qmp: cannot connect to '{place}': {os.strerror(error.errno or 0)}"
        ) from error
    return sock

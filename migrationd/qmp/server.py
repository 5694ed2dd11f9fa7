"""Monitors: one socket is one monitor with one client at a time.

A second client waits in the backlog until the first has gone, as in QEMU.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat

from migrationd.errors import ConnectFailed
from migrationd.qmp.client import Dispatch, MonitorClient
from migrationd.qmp.connection import Connection, SocketConnection, StdioConnection
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.fds import FdTable
from migrationd.qmp.monitor_spec import MonitorSpec

__all__ = ("Dispatch", "MonitorServer")

log = logging.getLogger(__name__)


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
        self._fds = FdTable()
        self._running: set[asyncio.Task[None]] = set()
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
        running = list(self._running)
        for command in running:
            command.cancel()
        await asyncio.gather(*running, return_exceptions=True)
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
            await MonitorClient(
                connection, self._dispatch, self._bus, self._fds, self._running
            ).serve()
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

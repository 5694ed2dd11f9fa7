"""Monitors: one socket is one monitor with one client at a time.

A second client waits in the backlog until the first has gone, as in QEMU.
"""

import asyncio
import contextlib
import logging
import os
import socket
from typing import Any

from migrationd.errors import ConnectFailed
from migrationd.linux.socket_file import SocketFile, remove_stale
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
        self._client: SocketConnection | None = None
        self._listener = inherited
        self._is_inherited = inherited is not None
        self._file: SocketFile | None = None
        self._fds = FdTable()
        self._running: set[asyncio.Future[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._first_client = asyncio.Event()

    @property
    def label(self) -> str:
        """Id of its character device, if it was given one."""
        return self._spec.label

    @property
    def filename(self) -> str:
        """What ``query-chardev`` calls the place."""
        spec = self._spec
        if spec.kind == "stdio":
            return "stdio"
        place = spec.path if spec.kind == "unix" else f"{spec.host}:{spec.port}"
        return f"{spec.kind}:{place}" + (",server=on" if spec.is_server else "")

    @property
    def is_socket(self) -> bool:
        """Whether its client can be cut off."""
        return self._spec.kind != "stdio"

    @property
    def is_pretty(self) -> bool:
        """Whether its output is spread over lines."""
        return self._spec.is_pretty

    @property
    def is_connected(self) -> bool:
        """Whether there is a client."""
        return self._client is not None or not self.is_socket

    def disconnect(self) -> None:
        """Cut the client off."""
        if self._client is not None:
            self._client.shutdown()

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
                self._file = SocketFile(spec.path) if spec.kind == "unix" else None
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
        if self._file is not None:
            self._file.remove()
        if self._listener is not None:
            self._listener.close()

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
        self._client = connection if isinstance(connection, SocketConnection) else None
        try:
            await MonitorClient(
                connection,
                self._dispatch,
                self._bus,
                self._fds,
                self._running,
                is_pretty=self._spec.is_pretty,
            ).serve()
        except OSError as error:
            log.debug("monitor client lost: %s", error)
        except Exception:  # a defect of ours must not end the monitor
            log.exception("internal error while a monitor client was served")
        finally:
            self._client = None


def _listen(spec: MonitorSpec) -> socket.socket:
    try:
        family, address = _resolve(spec)
        with contextlib.ExitStack() as on_error:
            sock = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if spec.kind == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
            else:
                _bind_unix(sock, spec.path)
            sock.listen(64)
            on_error.pop_all()
        return sock
    except OSError as error:
        raise _failed("listen on", spec, error) from error


def _bind_unix(sock: socket.socket, path: str) -> None:
    """Bind for the user alone; a socket that was left behind makes room, as in QEMU."""
    remove_stale(path)
    old_mask = os.umask(0o077)
    try:
        sock.bind(path)
    finally:
        os.umask(old_mask)


async def _connect(spec: MonitorSpec) -> socket.socket:
    try:
        family, address = _resolve(spec)
        with contextlib.ExitStack() as on_error:
            sock = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            on_error.pop_all()
        return sock
    except OSError as error:
        raise _failed("connect to", spec, error) from error


def _resolve(spec: MonitorSpec) -> tuple[int, Any]:
    """Address family and address; start-up alone may wait for a resolver."""
    if spec.kind == "unix":
        return socket.AF_UNIX, spec.path
    flags = socket.AI_PASSIVE if spec.is_server else 0
    info = socket.getaddrinfo(spec.host or None, spec.port, type=socket.SOCK_STREAM, flags=flags)
    return info[0][0], info[0][4]


def _failed(what: str, spec: MonitorSpec, error: OSError) -> ConnectFailed:
    place = spec.path or f"{spec.host}:{spec.port}"
    # Event loops write the address into the text; the number says it shorter.
    is_resolver = isinstance(error, socket.gaierror) or not error.errno
    reason = error.strerror if is_resolver else os.strerror(error.errno or 0)
    return ConnectFailed(f"-qmp: cannot {what} '{place}': {reason}")

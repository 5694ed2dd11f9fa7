"""The guest socket of ``-guest attach:PATH``: who connects, and when it is gone.

One workload at a time. Its introduction is read on a thread; that it is gone is noticed
at once, also while nothing is asked of it.

Reference: ``guest/protocol.py``.
"""

import asyncio
import contextlib
import logging
import os
import select
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

from migrationd.errors import MigrationdError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.workload_link import WorkloadLink
from migrationd.linux.socket_file import SocketFile

log = logging.getLogger(__name__)

_BACKLOG = 4
_AGAIN_S = 0.1
"""After a workload that could not be taken: what is short may be there again."""


class GuestSocket:
    """Listens for the workload.

    Args:
        path: Where; a socket that nobody listens on is replaced.
        on_attached: Called with each workload that introduced itself; raises to refuse it.
        on_gone: Called when it is gone.
        tracking: How its writes are noted.

    Raises:
        MigrationdError: The path cannot be bound.
    """

    def __init__(
        self,
        path: str,
        on_attached: Callable[[AttachedGuest], Awaitable[None]],
        on_gone: Callable[[AttachedGuest], None],
        tracking: str = "auto",
    ) -> None:
        self._on_attached = on_attached
        self._on_gone = on_gone
        self._tracking = tracking
        self._guest: AttachedGuest | None = None
        self._socket = _bind(path)
        self._file = SocketFile(path)
        self._task = asyncio.create_task(self._serve(), name="guest socket")

    async def aclose(self) -> None:
        """Stop listening; a workload that is attached stays so."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._file.remove()
        self._socket.close()

    async def _serve(self) -> None:
        while True:
            await _readable(self._socket.fileno())
            try:
                with contextlib.ExitStack() as on_error:
                    sock, _ = self._socket.accept()
                    on_error.callback(sock.close)
                    # Ours, so that it is noticed as well that a failed migration closed the link.
                    watched = os.dup(sock.fileno())
                    on_error.pop_all()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("guest socket: %s", error.strerror)
                await asyncio.sleep(_AGAIN_S)
                continue
            try:
                await self._attend(WorkloadLink(sock), watched)
            except Exception:  # a defect of ours must not keep the next workload out
                log.exception("internal error while a workload was attended")
            finally:
                os.close(watched)

    async def _attend(self, link: WorkloadLink, watched: int) -> None:
        guest: AttachedGuest | None = None
        try:
            guest = await asyncio.get_running_loop().run_in_executor(
                None, _introduce, link, self._tracking
            )
            await self._on_attached(guest)
        except Exception as error:
            if guest is not None:
                guest.close()
            else:
                link.close()
            if not isinstance(error, MigrationdError):
                raise
            log.warning("a workload was refused: %s", error)
            return
        log.info(
            "workload %s attached: %d RAM blocks, %d MiB",
            guest.name,
            len(guest.ram),
            guest.ram_bytes >> 20,
        )
        await _gone(watched)
        log.info("workload %s is gone", guest.name)
        self._on_gone(guest)


def _introduce(link: WorkloadLink, tracking: str) -> AttachedGuest:
    link.check_peer()
    introduced = link.introduction()
    try:
        return AttachedGuest(link, introduced, tracking)
    except BaseException:
        introduced.close()
        raise


def _bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise MigrationdError(f"-guest attach:{path}: {error.strerror or error}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that its daemon left behind.

    Raises:
        OSError: Somebody listens there.
    """
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def _gone(fd: int) -> None:
    """Wait until the other end hung up, without a look at what it sends."""
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLRDHUP | select.EPOLLHUP)
        await _readable(epoll.fileno())

"""A process whose memory and devices migrate.

    workload = Workload("counter")
    heap = workload.add_block("heap", 64 << 20)
    workload.add_device(COUNTER, state)
    workload.attach("/run/counter.guest")
    while True:
        with workload.active():
            ...change memory and state...

Nothing may change memory or devices outside ``active()``: that is where the daemon stops
the workload. The standard library suffices.

Reference: the guest socket's messages, ``migrationd/guest/protocol.py``.
"""

import array
import contextlib
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from migrationd.errors import GuestError, MigrationdError
from migrationd.linux.userfaultfd import (
    ASYNC_TRACKING,
    MODE_WP,
    SYNC_TRACKING,
    open_userfaultfd,
    register,
)
from migrationd.workload.block import Block, Origin, huge_page_bytes
from migrationd.workload.compare import problems
from migrationd.workload.devices import RESERVED_INSTANCE_ID, Devices
from migrationd.workload.gate import Gate
from migrationd.workload.lifeline import Lifeline
from migrationd.workload.names import check_name
from migrationd.workload.vmstate import VMState

VERSION = 1
MAX_PACKET_BYTES = 256 << 10
LOST_STATUS = 75
"""Exit status of a workload whose daemon was gone before all of its memory had come."""

_RECONNECT_WAIT_S = 60.0

_REFUSED_WAIT_S = 1.0
"""Pause before a daemon that refused this workload is asked again."""


class Workload:
    """One process that is a guest.

    Args:
        name: Of the program; source and destination have the same.
        on_loaded: Called after a state was loaded, before the workload may run.
        on_stopped: Called when it was stopped; nothing is in ``active()`` any more.
        on_started: Called when it may run, at first or again.
        on_quit: Called when the daemon ends the workload; the process exits by default.
        on_reset: Called when it is to begin anew, with nothing in ``active()``; without it the
            workload cannot be reset.
        on_powerdown: Called when somebody wants it to end in its own time.

    By postcopy a destination runs before its memory is there: a thread that touches what is
    missing waits for it, *with* the interpreter's lock, so that all threads do. If the daemon
    is gone before all memory came, nobody can bring the rest, and the process is ended.
    """

    def __init__(
        self,
        name: str,
        *,
        on_loaded: Callable[[], None] | None = None,
        on_stopped: Callable[[], None] | None = None,
        on_started: Callable[[], None] | None = None,
        on_quit: Callable[[], None] | None = None,
        on_reset: Callable[[], None] | None = None,
        on_powerdown: Callable[[], None] | None = None,
    ) -> None:
        check_name(name, "a workload")
        self.name = name
        self._on_loaded = on_loaded
        self._on_stopped = on_stopped
        self._on_started = on_started
        self._on_quit = on_quit or (lambda: os._exit(0))
        self._on_reset = on_reset
        self._on_powerdown = on_powerdown
        self._blocks: list[Block] = []
        self._devices = Devices()
        self._gate = Gate()
        self._path = ""
        self._is_attached = False
        self._begun = threading.Event()
        self._userfaultfd = -1
        self._is_lazy = False
        self._ran_lazily = False
        self._lifeline: Lifeline | None = None
        self._note = ""
        self._has_guest = False

    def add_block(self, name: str, size: int, *, huge: bool = False) -> mmap.mmap:
        """Make a RAM block.

        Args:
            name: Unique in the workload.
            size: Bytes; rounded up to whole pages.
            huge: In huge pages, which have to be set aside on this host. Writes are noted, and
                memory follows in a postcopy, by whole ones; both ends of a postcopy have them.

        Returns:
            Its memory, shared with the daemon and zero at first.

        Raises:
            GuestError: There is such a block, it cannot be called so, or there is no memory.
        """
        if self._is_attached:
            raise GuestError("blocks are added before the workload is attached")
        check_name(name, "a RAM block")
        if any(block.name == name for block in self._blocks):
            raise GuestError(f"there is a block '{name}' already")
        page_bytes = huge_page_bytes() if huge else mmap.PAGESIZE
        block = Block(name, -(-size // page_bytes) * page_bytes, is_huge=huge)
        block.lock()
        self._blocks.append(block)
        return block.memory

    def add_device(
        self, state: VMState, target: object, instance_id: int = RESERVED_INSTANCE_ID
    ) -> int:
        """Declare a device.

        Args:
            state: What of it travels.
            target: The object with the attributes.
            instance_id: Of several of one name; numbered automatically if not given.

        Returns:
            The instance id.

        Raises:
            GuestError: That instance exists, or the workload is attached.
        """
        if self._is_attached:
            raise GuestError("devices are added before the workload is attached")
        return self._devices.add(state, target, instance_id)

    def declarations(self) -> list[dict[str, Any]]:
        """Declarations of all devices, for the daemon and for comparing versions."""
        return self._devices.declarations()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Wait until the workload may run; while the block runs it is not stopped."""
        self._gate.enter()
        try:
            yield
        finally:
            self._gate.leave()

    def try_enter(self) -> bool:
        """As the beginning of ``active()``, for an event loop: never waits, see :attr:`rest_s`.

        Returns:
            False if the workload may not run now; otherwise :meth:`leave` has to follow.
        """
        return self._gate.try_enter()

    @property
    def rest_s(self) -> float:
        """Seconds that a throttled workload has to rest from now on.

        ``active()`` does; whoever uses :meth:`try_enter` waits so long before it.
        """
        return self._gate.rest_s

    def leave(self) -> None:
        """The end of what :meth:`try_enter` began."""
        self._gate.leave()

    @property
    def is_running(self) -> bool:
        """Whether the workload may run now."""
        return self._gate.is_open

    def attach(self, path: str, *, timeout_s: float = 10.0) -> None:
        """Connect to the daemon and answer it on a thread from now on.

        Returns when the daemon has said what it wants this workload for: one that is to be
        a destination does not run for a moment first.

        Args:
            path: The daemon's guest socket.
            timeout_s: How long to wait for the daemon to be there, and for its word.

        Raises:
            GuestError: It is attached already, nobody listens, or the daemon refused it.
        """
        if self._is_attached:
            raise GuestError(f"the workload is attached to '{self._path}' already")
        sock = _connect(path, timeout_s)
        self._path = path
        try:
            self._introduce(sock)
        except OSError as error:
            sock.close()
            raise GuestError(f"guest socket '{path}': {error.strerror}") from error
        self._is_attached = True
        threading.Thread(target=self._serve, args=(sock,), name="guest socket", daemon=True).start()
        if not self._begun.wait(timeout_s):
            raise GuestError(f"the daemon behind '{path}' does not take this workload")

    def _introduce(self, sock: socket.socket) -> None:
        given = self._open_descriptors()
        hello = {
            "version": VERSION,
            "name": self.name,
            "page_size": mmap.PAGESIZE,
            "running": self._gate.is_open,
            "devices": self.declarations(),
            "note": self._note,
            "has_guest": self._has_guest,
            "descriptors": list(given),
        }
        try:
            _send(sock, {"hello": hello}, list(given.values()))
        finally:
            for name, fd in given.items():
                if name != "userfaultfd":
                    os.close(fd)
        for block in self._blocks:
            told = {"name": block.name, "size": block.size, "address": block.address}
            _send(sock, {"block": told}, [block.fd])
        _send(sock, {"ready": {}}, [])

    def _open_descriptors(self) -> dict[str, int]:
        """What the kernel gives to look after the blocks with, by name.

        ``faults`` stays the daemon's alone: when it is gone, nobody waits any more.
        """
        given: dict[str, int] = {}
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)  # what it watched is free again
            self._userfaultfd = -1
        with contextlib.suppress(GuestError, OSError):
            self._userfaultfd = open_userfaultfd(ASYNC_TRACKING)
            for block in self._blocks:
                register(self._userfaultfd, block.address, block.size, MODE_WP)
            given["pagemap"] = os.open("/proc/self/pagemap", os.O_RDONLY)
            given["userfaultfd"] = self._userfaultfd
        with contextlib.suppress(GuestError):
            # A system call of this process that writes to a block has to wait, not to fail.
            given["faults"] = open_userfaultfd(SYNC_TRACKING, only_user_faults=False)
        return given

    def _serve(self, sock: socket.socket) -> None:
        """Answer one daemon after the other.

        When a daemon is gone, a workload that runs goes on alone; one that stands still
        keeps standing, for it may run elsewhere. Both wait for the next daemon.
        """
        while True:
            was_taken = self._serve_one(sock)
            for block in self._blocks:
                if block.origin is Origin.LENT:
                    block.renew()
            sock.close()
            if self._ran_lazily:
                # What is missing would read as zero: better no guest than a wrong one.
                os._exit(LOST_STATUS)
            self._gate.throttle(0)
            if not was_taken:
                time.sleep(_REFUSED_WAIT_S)
            while True:
                with contextlib.suppress(MigrationdError, OSError):
                    sock = _connect(self._path, _RECONNECT_WAIT_S)
                    self._introduce(sock)
                    break

    def _serve_one(self, sock: socket.socket) -> bool:
        """Answer until the daemon is gone; False if it never said a word: it refused."""
        was_taken = False
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, 4)
            except OSError:
                data, fds = b"", []
            if not data:
                return was_taken
            was_taken = True
            try:
                request = json.loads(data)
                answer, out = self._answer(request, fds)
            except MigrationdError as error:
                answer, out = {"error": str(error)[:4096]}, []
            except Exception as error:  # a hook's defect is the answer
                answer, out = {"error": f"{type(error).__name__}: {error}"[:4096]}, []
            finally:
                for fd in fds:
                    os.close(fd)
            with contextlib.suppress(OSError):
                try:
                    _send(sock, answer | {"id": request["id"]}, out)
                except GuestError as error:
                    _send(sock, {"error": str(error), "id": request["id"]}, [])
            for fd in out:
                os.close(fd)
            if request.get("execute") == "quit":
                self._on_quit()

    def _answer(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        arguments = request.get("arguments", {})
        match request.get("execute"):
            case "begin":
                if arguments["role"] == "destination":
                    self._make_room()
                    self._note = ""
                    self._forget_lazy()
                self._has_guest = arguments["role"] == "source"
                self._begun.set()
            case "stop":
                self._stop()
            case "start":
                self._start()
            case "throttle":
                self._gate.throttle(arguments["percentage"])
            case "check":
                if found := problems(arguments["devices"], self.declarations()):
                    raise GuestError("; ".join(found))
            case "save":
                saved, body = self._devices.save()
                return {"return": saved}, [body]
            case "load":
                self._load_on_lifeline(arguments["devices"], fds[0])
            case "remap":
                self._remap(arguments["block"], fds[0], arguments["is_lent"])
            case "lazy":
                self._is_lazy = True
                self._lifeline = Lifeline(fds[0])
            case "whole":
                self._forget_lazy()
            case "keep":
                self._note = arguments["note"]
            case "reset":
                self._reset()
            case "powerdown":
                if self._on_powerdown is not None:
                    self._on_powerdown()
            case "quit":
                pass
            case other:
                raise GuestError(f"request '{other}' is not known")
        return {"return": {}}, []

    def _load_on_lifeline(self, saved: list[dict[str, Any]], fd: int) -> None:
        """Load; a hook that reads memory may wait for pages meanwhile."""
        if self._lifeline is None:
            self._load(saved, fd)
            return
        self._lifeline.arm()
        try:
            self._load(saved, fd)
        finally:
            self._lifeline.disarm()

    def _forget_lazy(self) -> None:
        """All memory is there, or none is waited for."""
        self._is_lazy = self._ran_lazily = False
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            lifeline.close()

    def _make_room(self) -> None:
        """Stand still for the daemon to make all memory empty."""
        for block in self._blocks:
            if block.origin is Origin.CAME:
                raise GuestError(
                    f"block '{block.name}' is another process's, and never ran here: it must "
                    "not be emptied"
                )
        self._stop()

    def _remap(self, name: str, fd: int, is_lent: bool) -> None:
        if self._gate.is_open:
            raise GuestError("memory is not replaced while the workload runs")
        block = next((item for item in self._blocks if item.name == name), None)
        if block is None:
            raise GuestError(f"there is no block '{name}'")
        block.remap(fd, Origin.LENT if is_lent else Origin.OWN)
        if self._userfaultfd >= 0:
            register(self._userfaultfd, block.address, block.size, MODE_WP)

    def _stop(self) -> None:
        was_open = self._gate.is_open
        self._gate.close()
        for block in self._blocks:
            block.unlock()
        if was_open and self._on_stopped is not None:
            self._on_stopped()

    def _start(self) -> None:
        was_open = self._gate.is_open
        try:
            for block in self._blocks:
                block.lock()
        except GuestError:
            for block in self._blocks:
                block.unlock()
            raise
        for block in self._blocks:
            block.origin = Origin.OWN
        self._has_guest = True
        self._ran_lazily = self._is_lazy
        if self._lifeline is not None:
            self._lifeline.arm()
        self._gate.open()
        if not was_open and self._on_started is not None:
            self._on_started()

    def _reset(self) -> None:
        if self._on_reset is None:
            raise GuestError(f"workload '{self.name}' cannot be reset")
        was_open = self._gate.is_open
        self._gate.close()
        try:
            self._on_reset()
        finally:
            if was_open:
                self._gate.open()

    def _load(self, saved: list[dict[str, Any]], fd: int) -> None:
        self._devices.load(saved, fd)
        if self._on_loaded is not None:
            self._on_loaded()
        self._has_guest = True
        for block in self._blocks:
            if block.origin is Origin.LENT:
                block.origin = Origin.CAME


def _connect(path: str, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The kernel's default is less than the longest message.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET_BYTES)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            if time.monotonic() > deadline:
                raise GuestError(f"guest socket '{path}': {error.strerror}") from error
            time.sleep(0.01)
        except OSError as error:
            sock.close()
            raise GuestError(f"guest socket '{path}': {error.strerror}") from error


def _send(sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    data = json.dumps(message).encode()
    if len(data) > MAX_PACKET_BYTES:
        raise GuestError(f"a message of {len(data)} bytes is too long for the guest socket")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

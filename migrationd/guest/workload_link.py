"""The daemon's end of the guest socket: one request at a time, each with a deadline.

Everything here blocks and is called on a thread. A workload that hangs, dies or lies
costs a :class:`GuestError`, never more.

Reference: ``guest/protocol.py``.
"""

import array
import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from migrationd.errors import GuestError, WorkloadRefused, WorkloadSilent
from migrationd.guest.memory import memory_page_bytes
from migrationd.guest.protocol import (
    MAX_BLOCKS,
    MAX_PACKET_BYTES,
    MAX_STATE_BYTES,
    REQUESTS,
    VERSION,
    WITH_DESCRIPTORS,
    Block,
    Hello,
    Introduction,
    Json,
    Reply,
    Saved,
    build_models,
)

INTRODUCTION_WAIT_S = 10.0
"""A workload that has not introduced itself by then is refused."""

REQUEST_WAIT_S = 5.0
"""A request that is not answered by then has failed."""

_FDS = 4
_Model = TypeVar("_Model", bound=BaseModel)


class Introduced:
    """What a workload said of itself, with its descriptors.

    Attributes:
        hello: Name, devices and whether it runs.
        blocks: RAM blocks with their memfds, in order.
        pagemap: Descriptor, or -1 if its memory cannot be tracked.
        userfaultfd: The same; watches every block asynchronously.
        faults: Descriptor of another one that watches nothing yet, or -1 if nothing can wait
            for faults to be served.
    """

    def __init__(self) -> None:
        self.hello: Hello
        self.blocks: list[tuple[Block, int]] = []
        self.pagemap = -1
        self.userfaultfd = -1
        self.faults = -1

    def replace_block(self, index: int, fd: int) -> None:
        """Take over another memfd for a block and close the one that it had."""
        block, old = self.blocks[index]
        self.blocks[index] = (block, fd)
        os.close(old)

    def watch_no_more(self) -> None:
        """Close what its memory is watched by."""
        watching = (self.pagemap, self.userfaultfd, self.faults)
        self.pagemap = self.userfaultfd = self.faults = -1
        for fd in watching:
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        """Close every descriptor."""
        self.watch_no_more()
        blocks, self.blocks = self.blocks, []
        for _, fd in blocks:
            os.close(fd)


class WorkloadLink:
    """One connected workload.

    Args:
        sock: Accepted ``SOCK_SEQPACKET`` socket; owned.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._next_id = 1
        build_models()
        self._pidfd = -1
        sock.setblocking(True)
        # The kernel's default is less than the longest message.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_PACKET_BYTES)

    def check_peer(self) -> int:
        """Refuse a process of another user.

        Returns:
            Its process id.

        Raises:
            GuestError: It belongs to somebody else.
        """
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3i", raw)
        if uid not in (0, os.geteuid()):
            raise GuestError(f"process {pid} of user {uid} may not attach as the guest")
        with contextlib.suppress(OSError):  # gone already
            self._pidfd = os.pidfd_open(pid)
        return int(pid)

    def introduction(self) -> Introduced:
        """Read what the workload says of itself.

        Raises:
            GuestError: It says nothing in time, or what it says is wrong.
        """
        self._socket.settimeout(INTRODUCTION_WAIT_S)
        found = Introduced()
        fds: list[int] = []
        try:
            message, fds = self._receive(Introduction)
            if message.hello is None:
                raise GuestError("the workload does not begin with hello")
            found.hello = message.hello
            if message.hello.version != VERSION:
                raise GuestError(
                    f"the workload speaks version {message.hello.version} of the guest socket, "
                    f"this daemon version {VERSION}"
                )
            names = message.hello.descriptors
            if len(set(names)) != len(names) or len(fds) != len(names):
                raise GuestError(
                    f"the workload names {len(names)} descriptors and passes {len(fds)}"
                )
            for name, fd in zip(names, fds, strict=True):
                setattr(found, name, fd)
            fds = []
            if (found.pagemap < 0) != (found.userfaultfd < 0):
                raise GuestError("a workload's pagemap and userfaultfd go together")
            while True:
                message, fds = self._receive(Introduction)
                if message.ready is not None and found.blocks:
                    return found
                self._add_block(found, message.block, fds)
                fds = []
        except BaseException:
            for fd in fds:
                os.close(fd)
            found.close()
            raise

    def request(
        self,
        name: str,
        arguments: BaseModel | None = None,
        fds: tuple[int, ...] = (),
        *,
        timeout_s: float | None = None,
    ) -> tuple[Any, list[int]]:
        """Ask the workload and wait for its answer.

        Args:
            name: Of the request.
            arguments: Of its type; None for none.
            fds: Descriptors that go along; they stay open here.
            timeout_s: Longest wait; ``REQUEST_WAIT_S`` if not given.

        Returns:
            The validated return, and descriptors, which belong to the caller.

        Raises:
            WorkloadRefused: It answered with an error.
            WorkloadSilent: It did not answer in time.
            GuestError: It is gone, or answered nonsense.
        """
        returns = REQUESTS[name][1]
        with self._lock:
            number = self._next_id
            self._next_id += 1
            message: Json = {"execute": name, "id": number}
            if arguments is not None:
                message["arguments"] = arguments.model_dump(by_alias=True)
            wait_s = REQUEST_WAIT_S if timeout_s is None else timeout_s
            deadline_s = time.monotonic() + wait_s
            self._socket.settimeout(wait_s)
            self._send(message, fds)
            while True:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise WorkloadSilent
                self._socket.settimeout(left_s)
                reply, received = self._receive(Reply)
                if reply.id == number:
                    break
                # The answer to a request that had timed out.
                for fd in received:
                    os.close(fd)
        try:
            if reply.error is not None:
                raise WorkloadRefused(f"the workload: {reply.error}")
            if received and name not in WITH_DESCRIPTORS:
                raise GuestError(f"the workload answers {name} with descriptors")
            return _validated(returns, reply.return_ or {}, f"answer to {name}"), received
        except BaseException:
            for fd in received:
                os.close(fd)
            raise

    def save(self) -> tuple[Saved, bytes]:
        """Devices and their bodies, one behind the other.

        Raises:
            GuestError: As :meth:`request`, or the lengths are not those of the memfd.
        """
        saved, fds = self.request("save")
        try:
            if len(fds) != 1:
                raise GuestError("the workload's devices come without their memfd")
            total = sum(device.length for device in saved.devices)
            size = os.fstat(fds[0]).st_size
            if total != size or total > MAX_STATE_BYTES:
                raise GuestError(f"the workload announced {total} bytes of devices and has {size}")
            if len(saved.description) != len(saved.devices):
                raise GuestError("the workload describes other devices than it saves")
            bodies = os.pread(fds[0], total, 0)
            if len(bodies) != total:
                raise GuestError("the workload's devices are cut short")
            return saved, bodies
        except OSError as error:
            raise GuestError(f"the workload's devices: {error.strerror}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def load(self, saved: Saved, bodies: bytes, *, timeout_s: float | None = None) -> None:
        """Give the workload the state of its devices.

        Args:
            saved: What they are.
            bodies: Their states, one behind the other.
            timeout_s: As for :meth:`request`.

        Raises:
            GuestError: As :meth:`request`.
        """
        fd = os.memfd_create("migrationd-devices", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(bodies)
            self.request("load", saved, (fd,), timeout_s=timeout_s)
        finally:
            os.close(fd)

    def kill(self) -> None:
        """Kill the workload; only after :meth:`check_peer`."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close the connection; the workload goes on alone, or ends."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _add_block(self, found: Introduced, block: Block | None, fds: list[int]) -> None:
        if block is None or len(fds) != 1:
            raise GuestError("the workload's introduction is out of order")
        if len(found.blocks) == MAX_BLOCKS:
            raise GuestError(f"the workload has more than {MAX_BLOCKS} RAM blocks")
        if any(other.name == block.name for other, _ in found.blocks):
            raise GuestError(f"the workload has RAM block '{block.name}' twice")
        try:
            size = os.fstat(fds[0]).st_size
            page_size = max(found.hello.page_size, memory_page_bytes(fds[0]))
        except OSError as error:
            raise GuestError(f"RAM block '{block.name}': {error.strerror}") from error
        if size < block.size or block.size % page_size or block.address % page_size:
            raise GuestError(
                f"RAM block '{block.name}' of {block.size} bytes at {block.address:#x} does not "
                f"fit its memfd of {size} bytes"
            )
        found.blocks.append((block, fds[0]))

    def _send(self, message: Json, fds: tuple[int, ...]) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_PACKET_BYTES:
            raise GuestError(f"a request of {len(data)} bytes is too long for the guest socket")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise GuestError("the workload does not read its socket") from None
        except OSError as error:
            raise GuestError(f"the workload is gone: {error.strerror}") from error

    def _receive(self, model: type[_Model]) -> tuple[_Model, list[int]]:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._socket, MAX_PACKET_BYTES, _FDS, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise WorkloadSilent from None
        except OSError as error:
            raise GuestError(f"the workload is gone: {error.strerror}") from error
        try:
            if not data:
                raise GuestError("the workload is gone")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise GuestError("the workload's message is too long")
            try:
                tree = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise GuestError(f"the workload's message is no JSON: {error}") from None
            return _validated(model, tree, "message"), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def _validated(model: type[_Model], tree: object, what: str) -> _Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise GuestError(f"the workload's {what}: {where}: {first['msg']}") from None

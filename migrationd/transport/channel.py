"""A byte channel over one descriptor: socket, pipe or file.

Data calls block and are made on a thread of their own; :meth:`Channel.shutdown` ends
them from any other thread, which is how a migration is cancelled. The return path
reads the same descriptor on the event loop.

Buffer sizes of sockets are left to the kernel: 128 KiB to 4 MiB made no difference.
Gathering 8-byte headers and 4 KiB pages out of guest memory beat copying both into a
buffer first, in rate and in CPU time.

Reference: error texts are those of QEMU's channels.
"""

import asyncio
import contextlib
import ctypes
import functools
import os
import select
import socket
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.errors import ChannelClosed
from migrationd.linux.iovec import (
    IOV_MAX,
    Vector,
    Window,
    address_of,
    page_vector,
    recv_now,
    recv_vector,
    recv_vector_all,
    rest_of,
    send_entries,
    send_vector,
    write_vector,
)
from migrationd.transport.command import Command
from migrationd.transport.shared_descriptor import SharedDescriptor

GATHER_MS = 1
"""Longest wait for more than a byte; a slower peer is read as its bytes come."""


class Channel(SharedDescriptor):
    """One open channel; owns its descriptor and its command.

    One thread sends and one thread or task receives; :meth:`shutdown` is for all.

    Args:
        fd: Open descriptor; closed with the channel, also when this constructor raises.
        command: Process behind an ``exec:`` channel.
        is_durable: Regular file that must be on stable storage when :meth:`finish` returns.

    Attributes:
        is_socket: Whether it is a socket.
        is_duplex: Whether there is a way back, so that a return path is possible.
        is_seekable: Whether it is a regular file.
        bytes_sent: Bytes that the kernel took.
        bytes_received: Bytes received.

    Raises:
        ConnectFailed: The descriptor is none, or there are too many.
    """

    why_silent: str | None = None
    """What it may mean that the peer closes before it says anything; None: nothing special."""

    def __init__(
        self, fd: int, *, command: Command | None = None, is_durable: bool = False
    ) -> None:
        super().__init__(fd, command)
        self._is_durable = is_durable
        self._writable: select.poll | None = None
        self._readable: select.poll | None = None
        self._low_water = 1
        self.bytes_sent = 0
        self.bytes_received = 0

    def recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """Receive what is there, at least one byte.

        Args:
            view: Where the bytes go; not empty.
            timeout_s: Longest wait for the first byte; 0 does not wait, None waits for ever.

        Returns:
            Bytes received; 0 at the end of the input.

        Raises:
            TimeoutError: Nothing came in time.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            if self._must_wait_for_writer:
                # Before the first writer has opened it, a FIFO reads as ended.
                self._wait(select.POLLIN, timeout_s)
                self._must_wait_for_writer = False
            return self._receive(lambda: self._try_recv(view), timeout_s)

    def gather(self, size_bytes: int) -> bool:
        """Wait a moment until so much has come, until :meth:`gather_no_more`. Sockets only.

        A reader that is faster than its peer is woken for each segment, which costs both ends
        more than to copy it. Only TCP knows how to wait for more than a byte.

        Returns:
            Whether it came in time; what waits from now on waits for a byte again if not.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._in_use:
            self._set_low_water(size_bytes)
            if self._readable is None:
                self._readable = select.poll()
                self._readable.register(self._fd, select.POLLIN)
            if self._readable.poll(GATHER_MS):
                return True
            self._set_low_water(1)
            return False

    def gather_no_more(self) -> None:
        """Wait for a byte again. Sockets only.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._in_use:
            self._set_low_water(1)

    def _set_low_water(self, size_bytes: int) -> None:
        if self._low_water != size_bytes and self._socket is not None:
            self._low_water = size_bytes
            with contextlib.suppress(OSError):  # a peer may be gone
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)

    def recv_vector(self, vector: Vector, timeout_s: float | None) -> int:
        """Receive what is there into a scatter vector; sockets only.

        Args:
            vector: Where the bytes go, shape ``(n, 2)``; must live until this returns.
            timeout_s: Longest wait for the first byte; None waits for ever.

        Returns:
            Bytes received; 0 at the end of the input.

        Raises:
            TimeoutError: Nothing came in time.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            return self._receive(lambda: recv_vector(self._fd, vector), timeout_s)

    def recv_now(self, view: memoryview) -> int:
        """Receive the little that is there without waiting, inside :meth:`held`; sockets only.

        Returns:
            Bytes put into the view; 0 at the end of the input, -1 when nothing is there.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        try:
            count = recv_now(self._fd, address, len(view))
        except OSError as error:
            raise self._broken("read from", error) from error
        if count <= 0:
            self._refuse_if_down()
        else:
            self.bytes_received += count
        return count

    def recv_exactly(self, vector: Vector, size: int) -> int:
        """Fill a scatter vector, for as long as it takes; sockets only.

        Args:
            vector: Where the bytes go, shape ``(n, 2)``; changed by the call. What it points
                to must live until this returns.
            size: Bytes of it.

        Returns:
            Bytes received; fewer than asked for at the end of the input.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        total = 0
        with self._in_use:
            while True:
                count = self._receive(functools.partial(recv_vector_all, self._fd, vector), None)
                total += count
                if not count or total == size:
                    return total
                vector = rest_of(vector, count)

    def recv_window(self, window: Window, size_bytes: int) -> int:
        """:meth:`recv_exactly` into a window, inside :meth:`held`; sockets only.

        Args:
            window: Where the bytes go; stays as it is.
            size_bytes: Sum of its lengths.

        Returns:
            Bytes received; fewer than asked for at the end of the input.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        try:
            done = window.receive(self._fd)
        except InterruptedError:
            done = 0
        except OSError as error:
            raise self._broken("read from", error) from error
        self.bytes_received += done
        if done == size_bytes:
            return done
        return done + self.recv_exactly(rest_of(window.vector(), done), size_bytes - done)

    def recv_some(self, max_bytes: int) -> bytes:
        """Receive without waiting; for the event loop.

        Returns:
            Bytes, empty at the end of the input.

        Raises:
            BlockingIOError: Nothing is there.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            try:
                if self._socket is not None:
                    data = self._socket.recv(max_bytes, socket.MSG_DONTWAIT)
                else:
                    data = os.read(self._fd, max_bytes)
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._broken("read from", error) from error
            if not data:
                self._refuse_if_down()
            self.bytes_received += len(data)
            return data

    @property
    def can_peek(self) -> bool:
        """Whether :meth:`peek` is possible."""
        return self.is_socket

    def peek(self, max_bytes: int) -> bytes:
        """Look at the next bytes without taking them or waiting; sockets only.

        Returns:
            Bytes, empty at the end of the input.

        Raises:
            BlockingIOError: Nothing is there.
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            assert self._socket is not None
            try:
                return self._socket.recv(max_bytes, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._broken("read from", error) from error

    def recv_blocking(self, max_bytes: int) -> bytes:
        """Receive what is there, at least one byte; sockets only.

        One system call, for a thread whose answer is urgent; it wakes 10 us sooner than
        :meth:`recv_into`.

        Returns:
            Bytes; empty at the end of the input.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            assert self._socket is not None
            try:
                data = self._socket.recv(max_bytes)
            except OSError as error:
                raise self._broken("read from", error) from error
            if not data:
                self._refuse_if_down()
            self.bytes_received += len(data)
            return data

    async def wait_readable(self, timeout_s: float | None = None) -> bool:
        """Wait on the event loop until :meth:`recv_some` has something to say.

        Returns:
            False when the time ran out.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        if self.is_seekable:
            self._refuse_if_down()
            return True
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        with self._in_use:
            fds = (self._fd, self._wakeup)
            for fd in fds:
                loop.add_reader(fd, ready.set)
            try:
                await asyncio.wait_for(ready.wait(), timeout_s)
            except TimeoutError:
                return False
            finally:
                for fd in fds:
                    loop.remove_reader(fd)
                if self._socket is not None:
                    # uvloop makes what it watches non-blocking.
                    self._socket.setblocking(True)
            self._refuse_if_down()
            return True

    def send(self, data: bytes | memoryview) -> None:
        """Send everything.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        if not data:
            return
        array = np.frombuffer(data, np.uint8)
        self.send_vector(np.array([[address_of(array), len(array)]], np.uint64))

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> int:
        """Send a few parts, one behind the other; sockets only.

        For single pages it takes half the time of :meth:`send_vector`.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            assert self._socket is not None
            size = sum(map(len, parts))
            try:
                done = self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
                if done < size:
                    self._socket.sendall(b"".join(parts)[done:], socket.MSG_NOSIGNAL)
            except OSError as error:
                raise self._broken("write to", error) from error
            self.bytes_sent += size
            return size

    def wait_writable(self) -> None:
        """Wait until the kernel takes more without waiting itself. Sockets only; one thread.

        How much may be queued by then follows from :meth:`limit_send_queue`.

        Raises:
            ChannelClosed: The channel was shut down.
        """
        with self._in_use:
            if self._writable is None:
                self._writable = select.poll()
                self._writable.register(self._fd, select.POLLOUT)
                self._writable.register(self._wakeup, select.POLLIN)
            self._writable.poll()
            self._refuse_if_down()

    def send_pages(
        self,
        prefix: bytes,
        headers: npt.NDArray[np.uint8],
        memory: npt.NDArray[np.uint8],
        pages: npt.NDArray[np.int64],
        page_size: int,
    ) -> int:
        """Send a prefix and then, for each page, its header and its content.

        From 512 pages in a call on, more of them make no measurable difference.

        Args:
            prefix: Bytes that go first; may be empty.
            headers: One header per page, shape ``(n, h)``, contiguous.
            memory: Mapped memory of the whole RAM block.
            pages: Page numbers in it, shape ``(n,)``.
            page_size: Bytes of a page.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
            ValueError: A page does not lie in the memory.
        """
        vector = page_vector(headers, memory, pages, page_size)
        lead = np.frombuffer(prefix, np.uint8)
        if len(lead):
            head = np.array([[address_of(lead), len(lead)]], np.uint64)
            vector = np.concatenate((head, vector))
        return self.send_vector(vector)

    def send_vector(self, vector: Vector) -> int:
        """Send all of a gather vector; what it points to must live until this returns.

        Args:
            vector: Addresses and lengths, shape ``(n, 2)``; changed by the call.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            before = self.bytes_sent
            for start in range(0, len(vector), IOV_MAX):
                self._send_window(vector[start : start + IOV_MAX])
            return self.bytes_sent - before

    def send_window(self, vector: Vector, address: int, size_bytes: int) -> int:
        """:meth:`send_vector` of a short vector of which more is known; sockets only.

        Args:
            vector: Addresses and lengths, at most ``IOV_MAX`` entries.
            address: Of the vector.
            size_bytes: Sum of its lengths.

        Returns:
            Bytes sent.

        Raises:
            ChannelClosed: The channel was shut down, or the peer broke it.
        """
        with self._in_use:
            try:
                done = send_entries(self._fd, address, len(vector))
            except InterruptedError:
                done = 0
            except OSError as error:
                raise self._broken("write to", error) from error
            self.bytes_sent += done
            if done < size_bytes:
                self._send_window(rest_of(vector, done))
            return size_bytes

    def finish(self) -> None:
        """End a stream that was sent whole: the command took everything, the file is stored.

        Waits for as long as the command runs; :meth:`shutdown` ends the wait. After a
        stream was received whole from a command, it waits for the command's end as well.

        Raises:
            ChannelClosed: The command failed, the file could not be stored, or the channel
                was shut down.
        """
        with self._in_use:
            if self.is_seekable and self._is_durable:
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    raise self._broken("write to", error) from error
            if self._command is not None:
                self._close_fd()
                status = self._command.wait(self._wakeup)
                if status is None:
                    raise ChannelClosed("the channel was shut down")
                if self._command.is_writer:
                    return
                if status < 0:
                    raise ChannelClosed(f"the command was ended by signal {-status}")
                if status:
                    raise ChannelClosed(f"the command failed with status {status}")

    def _send_window(self, window: Vector) -> None:
        call = send_vector if self.is_socket else write_vector
        while len(window):
            self._refuse_if_down()
            try:
                done = call(self._fd, window)
            except BlockingIOError:
                self._wait(select.POLLOUT, None)
                continue
            except InterruptedError:
                continue
            except OSError as error:
                raise self._broken("write to", error) from error
            self.bytes_sent += done
            window = rest_of(window, done)

    def _receive(self, call: Callable[[], int], timeout_s: float | None) -> int:
        """Make a receiving call until it receives, or the input ends."""
        while True:
            try:
                count = call()
                break
            except BlockingIOError:
                if timeout_s == 0:
                    self._refuse_if_down()
                    raise TimeoutError from None
                self._wait(select.POLLIN, timeout_s)
            except InterruptedError:
                continue
            except OSError as error:
                raise self._broken("read from", error) from error
        if not count:
            self._refuse_if_down()  # a shutdown reads as the end
        self.bytes_received += count
        return count

    def _try_recv(self, view: memoryview) -> int:
        if self._socket is not None:
            return self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
        return os.readv(self._fd, (view,))

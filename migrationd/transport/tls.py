"""An encrypted channel: TLS over a socket.

The TLS library works on memory; system calls are made outside its lock, on the blocking
socket, so that :meth:`TlsChannel.shutdown` ends them as on every channel. One thread sends
while another receives: the library itself would not allow that.

The handshake is the first thing on every connection. The end of the input without TLS's own
end mark is an end like any other: old QEMUs leave the mark out, and a migration stream says
itself whether it is whole.

Reference: TLS of QEMU's migration channels, stream format 9.3.
"""

import asyncio
import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt

from migrationd.errors import ChannelClosed, ChannelError, ConnectFailed, MigrationdError
from migrationd.linux.iovec import (
    Vector,
    Window,
    address_of,
    gather,
    head_of,
    joined,
    rest_of,
    scatter,
    view_of,
)
from migrationd.transport.channel import Channel
from migrationd.transport.tls_reason import CertificateSeen, why_refused
from migrationd.transport.tls_settings import TlsClient, TlsServer, WhyRefused

HANDSHAKE_TIMEOUT_S = 30.0

_RECORD_BYTES = 16384
_CHUNK_BYTES = 16 * _RECORD_BYTES
_DIRECT_BYTES = 4 * 4096
"""Entries of a vector that are as long on the average are not gathered first."""


class TlsChannel(Channel):
    """A channel that encrypts; usable after :meth:`handshake`.

    Args:
        fd: Connected stream socket; closed with the channel.
        context: Certificates or keys.
        server_side: Which end this is.
        host: Name that the server's certificate must be for; None checks no name.
        peer: The other end in words, for errors.
        why_refused: Asked about the peer's certificates when they are valid.

    Raises:
        ConnectFailed: The descriptor cannot be used.
    """

    def __init__(
        self,
        fd: int,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        host: str | None,
        peer: str,
        why_refused: WhyRefused | None = None,
    ) -> None:
        super().__init__(fd)
        self._peer = peer
        self._why_refused = why_refused
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._seen = CertificateSeen(context)
        self._tls = context.wrap_bio(
            self._received, self._to_send, server_side=server_side, server_hostname=host
        )
        self._seen.watch(self._tls)
        self._tls_lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._cipher = memoryview(bytearray(_CHUNK_BYTES))
        self._looked_at = b""
        self._is_drained = False
        self._has_ended = False
        self._is_open = False
        self._is_server = server_side
        self._has_heard = False
        self._host = host

    async def handshake(self, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Agree on keys and check who is there.

        Raises:
            ConnectFailed: In one line: the certificate, the peer and the reason.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await asyncio.to_thread(self._shake):
                    await super().wait_readable()
                    with contextlib.suppress(BlockingIOError):
                        data = super().recv_some(_CHUNK_BYTES)
                        if not data:
                            raise self._failed("the peer closed the connection")
                        self._received.write(data)
        except TimeoutError:
            raise self._failed(f"the peer said nothing for {timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise self._failed(why_refused(error, self._seen, self._host)) from error
        except ChannelClosed as error:
            raise self._failed(str(error)) from error
        finally:
            self._seen.forget()
        self._is_open = True
        reason = self._why_refused(self._chain()) if self._why_refused is not None else None
        if reason is not None:
            raise self._failed(reason)

    @property
    def why_silent(self) -> str | None:  # type: ignore[override]
        """A server may ask who we are when we think that the handshake is over."""
        if self._is_server or self._has_heard or self._is_down:
            return None
        return (
            "a destination that closes right after the TLS handshake may have refused our "
            "certificate (its ca-cert.pem or tls-authz): its log says why"
        )

    def peer_certificate(self) -> bytes | None:
        """The other end's certificate in DER; None if it has none."""
        return self._tls.getpeercert(binary_form=True)

    def _chain(self) -> list[bytes]:
        """Certificates of the peer in DER up to whom we trust, its own first."""
        if hasattr(self._tls, "get_verified_chain"):  # since 3.13
            return list(self._tls.get_verified_chain())
        chain = self._tls._sslobj.get_verified_chain() or ()  # type: ignore[attr-defined]
        return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in chain]

    def recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """As :meth:`Channel.recv_into`."""
        while True:
            count = self._decrypt(view)
            if count or self._has_ended:
                return count
            size = super().recv_into(self._cipher, timeout_s)
            if not self._feed(self._cipher[:size]):
                return 0

    def recv_now(self, view: memoryview) -> int:
        """As :meth:`Channel.recv_now`."""
        try:
            return self.recv_into(view, 0)
        except TimeoutError:
            return -1

    def gather(self, size_bytes: int) -> bool:
        """As :meth:`Channel.gather`; nobody knows how much of it is here already."""
        del size_bytes
        return False

    def recv_vector(self, vector: Vector, timeout_s: float | None) -> int:
        """As :meth:`Channel.recv_vector`."""
        room = min(int(vector[:, 1].sum()), _CHUNK_BYTES)
        first = int(vector[0, 1])
        if first >= min(room, _DIRECT_BYTES):
            return self.recv_into(view_of(int(vector[0, 0]), first), timeout_s)
        staging = np.empty(room, np.uint8)
        count = self.recv_into(staging.data, timeout_s)
        if count:
            scatter(staging[:count], head_of(vector, count))
        return count

    def recv_exactly(self, vector: Vector, size: int) -> int:
        """As :meth:`Channel.recv_exactly`."""
        vector = joined(vector)
        total = 0
        while total < size:
            count = self.recv_vector(vector, None)
            if not count:
                break
            total += count
            vector = rest_of(vector, count)
        return total

    def recv_window(self, window: Window, size_bytes: int) -> int:
        """As :meth:`Channel.recv_window`."""
        return self.recv_exactly(window.vector(), size_bytes)

    def recv_some(self, max_bytes: int) -> bytes:
        """As :meth:`Channel.recv_some`."""
        plain = memoryview(bytearray(max_bytes))
        while True:
            count = self._decrypt(plain)
            if count or self._has_ended:
                return bytes(plain[:count])
            if not self._feed(super().recv_some(_CHUNK_BYTES)):
                return b""

    def recv_blocking(self, max_bytes: int) -> bytes:
        """As :meth:`Channel.recv_blocking`."""
        plain = memoryview(bytearray(max_bytes))
        return bytes(plain[: self.recv_into(plain, None)])

    def peek(self, max_bytes: int) -> bytes:
        """As :meth:`Channel.peek`: what is looked at stays to be received."""
        if len(self._looked_at) < max_bytes and not self._has_ended:
            with contextlib.suppress(BlockingIOError):
                looked_at, self._looked_at = self._looked_at, b""
                try:
                    looked_at += self.recv_some(max_bytes - len(looked_at))
                finally:
                    self._looked_at = looked_at
        if not self._looked_at and not self._has_ended:
            raise BlockingIOError
        return self._looked_at[:max_bytes]

    async def wait_readable(self, timeout_s: float | None = None) -> bool:
        """As :meth:`Channel.wait_readable`."""
        if self._looked_at or (self._is_open and not self._is_drained):
            self._refuse_if_down()
            return True
        is_readable = await super().wait_readable(timeout_s)
        self._is_drained = not is_readable
        return is_readable

    def send(self, data: bytes | memoryview) -> None:
        """As :meth:`Channel.send`."""
        self._encrypt(memoryview(data).cast("B"))

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> int:
        """As :meth:`Channel.send_parts`."""
        data = b"".join(parts)
        self._encrypt(memoryview(data))
        return len(data)

    def send_pages(
        self,
        prefix: bytes,
        headers: npt.NDArray[np.uint8],
        memory: npt.NDArray[np.uint8],
        pages: npt.NDArray[np.int64],
        page_size: int,
    ) -> int:
        """As :meth:`Channel.send_pages`."""
        count, width = headers.shape
        if count and not (int(pages.min()) >= 0 and int(pages.max()) < len(memory) // page_size):
            raise ValueError("a page does not lie in the memory")
        if prefix:
            self.send(prefix)
        rows = memory[: len(memory) // page_size * page_size].reshape(-1, page_size)
        step = max(1, _CHUNK_BYTES // (width + page_size))
        staging = np.empty((min(step, count), width + page_size), np.uint8)
        for start in range(0, count, step):
            part = pages[start : start + step]
            target = staging[: len(part)]
            target[:, :width] = headers[start : start + step]
            target[:, width:] = rows[part]
            self._encrypt(target.reshape(-1).data)
        return len(prefix) + len(pages) * (int(width) + page_size)

    def send_vector(self, vector: Vector) -> int:
        """As :meth:`Channel.send_vector`."""
        vector = joined(vector)
        size = int(vector[:, 1].sum())
        if size >= len(vector) * _DIRECT_BYTES:
            for address, length in vector.tolist():
                self._encrypt(view_of(address, length))
            return size
        staging = np.empty(min(size, _CHUNK_BYTES), np.uint8)
        left = size
        while left:
            step = min(left, _CHUNK_BYTES)
            gather(head_of(vector, step), staging[:step])
            self._encrypt(staging[:step].data)
            vector = rest_of(vector, step)
            left -= step
        return size

    def send_window(self, vector: Vector, address: int, size_bytes: int) -> int:
        """As :meth:`Channel.send_window`."""
        return self.send_vector(vector)

    def descriptor(self) -> NoReturn:
        """Refuse: nothing may go past the encryption.

        Raises:
            ChannelError: Always.
        """
        raise ChannelError("an encrypted channel has no descriptor to use directly")

    def shutdown(self) -> None:
        """As :meth:`Channel.shutdown`; says goodbye where that costs no wait."""
        if self._is_open and not self._is_down and self._send_lock.acquire(blocking=False):
            try:
                if self._tls_lock.acquire(blocking=False):
                    try:
                        self._say_goodbye()
                    finally:
                        self._tls_lock.release()
            finally:
                self._send_lock.release()
        super().shutdown()
        self._seen.forget()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        data = self._to_send.read()
        with contextlib.suppress(OSError), self._lock:
            if self._socket is not None and data:
                self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _shake(self) -> bool:
        """One step of the handshake; False if it waits for the peer."""
        try:
            with self._tls_lock:
                self._tls.do_handshake()
            is_done = True
        except ssl.SSLWantReadError:
            is_done = False
        except ssl.SSLError:
            with contextlib.suppress(ChannelError):
                self._flush()  # the peer is told why
            raise
        self._flush()
        return is_done

    def _flush(self) -> None:
        with self._send_lock:
            with self._tls_lock:
                data = self._to_send.read()
            if data:
                self._send_cipher(data)

    def _encrypt(self, plain: memoryview) -> None:
        size = len(plain)
        with self._send_lock:
            for begin in range(0, size, _CHUNK_BYTES):
                start, end = begin, min(begin + _CHUNK_BYTES, size)
                with self._tls_lock:
                    try:
                        while start < end:
                            start += self._tls.write(plain[start:end])
                    except ssl.SSLError as error:
                        raise self._lost("write to", error) from error
                    data = self._to_send.read()
                try:
                    self._send_cipher(data, end - begin)
                except ChannelClosed:
                    self._raise_alert()
                    raise

    def _send_cipher(self, data: bytes, plain_bytes: int = 0) -> None:
        before = self.bytes_sent
        array = np.frombuffer(data, np.uint8)
        super().send_vector(np.array([[address_of(array), len(array)]], np.uint64))
        self.bytes_sent = before + plain_bytes  # what the stream knows about

    def _decrypt(self, view: memoryview) -> int:
        """What can be had without the socket; 0 with ``_has_ended`` at the end."""
        done = 0
        if self._looked_at:
            done = min(len(self._looked_at), len(view))
            view[:done] = self._looked_at[:done]
            self._looked_at = self._looked_at[done:]
            return done
        with self._tls_lock:
            try:
                while done < len(view):
                    # The stubs do not know that with a buffer it counts.
                    count = cast("int", self._tls.read(len(view) - done, view[done:]))
                    if not count:
                        self._has_ended = not done
                        break
                    done += count
                self._is_drained = not (self._tls.pending() or self._received.pending)
            except ssl.SSLWantReadError:
                self._is_drained = True
            except ssl.SSLError as error:
                if not done:
                    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                        self._has_ended = True
                        return 0
                    raise self._lost("read from", error) from error
        if self._to_send.pending and self._send_lock.acquire(blocking=False):
            self._send_lock.release()
            self._flush()
        self._has_heard = self._has_heard or done > 0
        return done

    def _feed(self, data: bytes | memoryview) -> bool:
        """Hand received bytes to the library; False at the end of the input."""
        if data:
            with self._tls_lock:
                self._received.write(data)
            return True
        self._has_ended = True
        return False

    def _raise_alert(self) -> None:
        """Where writing failed, the peer may have said why."""
        poll = select.poll()
        with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError, OSError, ValueError):
            with self._in_use:
                poll.register(self._fd, select.POLLIN)
                if not poll.poll(0):
                    return
            self._received.write(super().recv_some(_CHUNK_BYTES))
            with self._tls_lock:
                try:
                    self._tls.read(1)
                except ssl.SSLWantReadError:
                    return
                except ssl.SSLError as error:
                    raise self._lost("write to", error) from error

    def _lost(self, what: str, error: ssl.SSLError) -> ChannelClosed:
        if self._is_down:
            return ChannelClosed("the channel was shut down")
        return ChannelClosed(
            f"Unable to {what} {self._peer}: TLS: {why_refused(error, self._seen, self._host)}"
        )

    def _failed(self, reason: str) -> ConnectFailed:
        return ConnectFailed(f"TLS handshake failed with {self._peer}: {reason}")


async def start_tls_client(
    channel: Channel, tls: TlsClient, address_host: str | None, peer: str
) -> TlsChannel:
    """Encrypt a connection that was just made.

    Args:
        channel: The connection; consumed.
        tls: Credentials.
        address_host: Host of the address, where it has one.
        peer: The address in words.

    Raises:
        ConnectFailed: In one line: the certificate, the peer and the reason.
    """
    host = tls.host or address_host
    if tls.checks_names and host is None:
        channel.close()
        raise ConnectFailed(
            f"TLS: {peer} has no host name to check the server's certificate for; set tls-hostname"
        )
    name = host if tls.checks_names else None
    return await _start(channel, tls, peer, host=name, server_side=False)


async def start_tls_server(channel: Channel, tls: TlsServer, peer: str) -> TlsChannel:
    """Encrypt a connection that was just accepted, and ask whether it may come in.

    Raises:
        MigrationdError: In one line: the certificate, the peer and the reason.
    """
    secured = await _start(channel, tls, peer, host=None, server_side=True)
    if tls.authorize is not None:
        try:
            tls.authorize(secured.peer_certificate())
        except MigrationdError:
            secured.close()
            raise
    return secured


async def _start(
    channel: Channel, tls: TlsClient | TlsServer, peer: str, *, host: str | None, server_side: bool
) -> TlsChannel:
    if not channel.is_socket:
        channel.close()
        raise ConnectFailed("TLS needs a socket; this transport has no way back")
    secured = TlsChannel(
        channel.detach(),
        tls.context,
        server_side=server_side,
        host=host,
        peer=peer,
        why_refused=tls.why_refused,
    )
    try:
        await secured.handshake()
    except BaseException:
        secured.close()
        raise
    return secured

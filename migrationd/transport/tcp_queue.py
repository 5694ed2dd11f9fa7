"""What lies between a TCP socket and the program that reads at its other end.

The kernels on both sides take in megabytes, and acknowledge what nobody has read; only the
window that the receiver still offers tells how much of it waits there.
"""

import socket
import struct

_INFO_BYTES = 232
_ACKED = struct.Struct("=Q")
_ACKED_AT = 120
_NOT_SENT = struct.Struct("=I")
_NOT_SENT_AT = 144
_LEAST_RTT = struct.Struct("=I")
_LEAST_RTT_AT = 148
_SENT = struct.Struct("=2Q")
_SENT_AT = 200
_WINDOW = struct.Struct("=I")
_WINDOW_AT = 228

_SHORT_LINE_US = 500


class TcpQueue:
    """An estimate of the bytes that what is written next would wait for.

    Args:
        connection: A connected TCP socket; not owned.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._widest = 0

    def size_bytes(self) -> int:
        """Bytes that were written and, as far as can be seen, not read.

        A long line needs what is on its way; on a short one it waits at the receiver, and is
        among them. Too few as long as the receiver makes its buffer larger without ever
        emptying it. 0 where the kernel tells too little.

        Raises:
            OSError: The socket is none of TCP.
        """
        info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        if len(info) < _INFO_BYTES:
            return 0
        (not_sent,) = _NOT_SENT.unpack_from(info, _NOT_SENT_AT)
        (window,) = _WINDOW.unpack_from(info, _WINDOW_AT)
        self._widest = max(self._widest, window)
        size = not_sent + self._widest - window
        (least_rtt_us,) = _LEAST_RTT.unpack_from(info, _LEAST_RTT_AT)
        if least_rtt_us <= _SHORT_LINE_US:
            (acked,) = _ACKED.unpack_from(info, _ACKED_AT)
            sent, again = _SENT.unpack_from(info, _SENT_AT)
            size += max(0, sent - again - acked)
        return int(size)

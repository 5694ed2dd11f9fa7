"""What lies between a TCP socket and the program that reads at its other end.

The kernels on both sides take in megabytes, and acknowledge what nobody has read; only the
window that the receiver still offers tells how much of it waits there.
"""

import socket
import struct

_INFO = struct.Struct("=120xQ16xII48xQQ12xI")
"""bytes_acked, notsent_bytes, min_rtt, bytes_sent, bytes_retrans and snd_wnd of tcp_info."""

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
        info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        if len(info) < _INFO.size:
            return 0
        acked, not_sent, least_rtt_us, sent, again, window = _INFO.unpack(info)
        self._widest = max(self._widest, window)
        size = not_sent + self._widest - window
        if least_rtt_us <= _SHORT_LINE_US:
            size += max(0, sent - again - acked)
        return int(size)

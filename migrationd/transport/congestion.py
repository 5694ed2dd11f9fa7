"""Congestion control of connections that never leave the host.

Between two processes of one host there is no network to share. A control that paces, such as
BBR, arms a timer for every few segments there and keeps the queue shorter than a reader takes at
once: it costs the sender half of its CPU time and the migration a third of its rate.
"""

import contextlib
import ipaddress
import socket

from migrationd.transport.resolve import SocketTarget

_UNPACED = b"reno"
"""Built into every kernel, and open to every user unless the administrator says otherwise."""


def use_no_pacing_on_this_host(sock: socket.socket, target: SocketTarget) -> None:
    """Take a control without pacing for a peer on this host; the system's choice for others.

    Pacing stays with a connection that began with it: call this before it is made.

    Args:
        sock: TCP socket, not connected.
        target: Resolved address to connect it to.
    """
    if is_on_this_host(sock.family, target):
        with contextlib.suppress(OSError):  # the administrator may have forbidden it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _UNPACED)


def is_on_this_host(family: int, target: SocketTarget) -> bool:
    """Whether what goes to this address stays on the host; asks the routes, sends nothing.

    Args:
        family: ``AF_INET`` or ``AF_INET6``.
        target: Resolved address.
    """
    host = str(target[0])
    if ipaddress.ip_address(host).is_loopback:
        return True
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return bool(probe.getsockname()[0] == host)
    except OSError:
        return False

"""What systemd asks of a service: readiness messages and passed sockets.

Reference: ``sd_notify(3)`` and ``sd_listen_fds(3)``; both are small protocols over
environment variables and need no library.
"""

import fcntl
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from migrationd.units import FD_MAX, parse_whole

_FIRST_PASSED_FD = 3
_PASSED_FD_LIMIT = 64


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """One descriptor that systemd passed.

    Attributes:
        fd: The descriptor, now close-on-exec.
        name: ``FileDescriptorName=`` of its socket unit; ``unknown`` where none was given.
    """

    fd: int
    name: str


def notify(state: str, environment: MutableMapping[str, str] | None = None) -> bool:
    """Send a message to the service manager.

    Args:
        state: Lines such as ``READY=1``, ``STOPPING=1`` or ``STATUS=…``.
        environment: Where ``NOTIFY_SOCKET`` is looked up; the process's by default.

    Returns:
        False when nobody asked to be notified or the message could not be sent: a
        service must not fail because its manager does not listen.
    """
    path = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect(address)
            manager.send(state.encode())
    except OSError:
        return False
    return True


def listen_fds(
    environment: MutableMapping[str, str] | None = None, *, pid: int | None = None
) -> list[PassedSocket]:
    """Take the descriptors that the service manager passed, once.

    The variables are removed, so that no child takes them for its own.

    Args:
        environment: Where the variables are looked up; the process's by default.
        pid: Process for which they must be meant; this one by default.

    Returns:
        The descriptors in the order of the socket units, or nothing.
    """
    variables = os.environ if environment is None else environment
    meant_for = variables.pop("LISTEN_PID", "")
    count = parse_whole(variables.pop("LISTEN_FDS", ""), FD_MAX)
    names = variables.pop("LISTEN_FDNAMES", "").split(":")
    if meant_for != str(os.getpid() if pid is None else pid) or count is None:
        return []
    passed = []
    for index in range(min(count, _PASSED_FD_LIMIT)):
        fd = _FIRST_PASSED_FD + index
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        name = names[index] if index < len(names) and names[index] else "unknown"
        passed.append(PassedSocket(fd, name))
    return passed

"""Monitors on sockets that the service manager opened (systemd socket activation)."""

import os
import socket
from collections.abc import Sequence
from dataclasses import replace

from migrationd.errors import ConfigError
from migrationd.linux.sd_notify import PassedSocket
from migrationd.qmp.monitor_spec import MonitorSpec


def pair_monitors(
    specs: Sequence[MonitorSpec], passed: Sequence[PassedSocket]
) -> list[tuple[MonitorSpec, socket.socket | None]]:
    """Give each passed socket the ``-qmp`` that names its address, or a monitor of its own.

    Args:
        specs: The monitors of the command line.
        passed: Descriptors of the service manager; the sockets returned own them.

    Returns:
        Each monitor with its listening socket, or with None where it opens one itself.

    Raises:
        ConfigError: A descriptor is not a listening stream socket.
    """
    sockets = [(_listening_spec(entry), entry) for entry in passed]
    pairs: list[tuple[MonitorSpec, socket.socket | None]] = []
    for spec in specs:
        if spec.fd is not None:
            place = _listening_spec(PassedSocket(spec.fd, f"-chardev id={spec.label}"))
            os.set_inheritable(spec.fd, False)
            there = replace(
                spec, kind=place.kind, path=place.path, host=place.host, port=place.port
            )
            pairs.append((there, socket.socket(fileno=spec.fd)))
            continue
        match = next((pair for pair in sockets if _is_at(spec, pair[0])), None)
        if match is None:
            pairs.append((spec, None))
            continue
        sockets.remove(match)
        pairs.append((spec, socket.socket(fileno=match[1].fd)))
    pairs += [(spec, socket.socket(fileno=entry.fd)) for spec, entry in sockets]
    return pairs


def _is_at(spec: MonitorSpec, place: MonitorSpec) -> bool:
    key = (spec.kind, spec.path, spec.host, spec.port, spec.is_server)
    return key == (place.kind, place.path, place.host, place.port, True)


def _listening_spec(entry: PassedSocket) -> MonitorSpec:
    problem = ConfigError(f"the passed descriptor '{entry.name}' is not a listening stream socket")
    try:
        passed = socket.socket(fileno=entry.fd)
    except OSError:
        raise problem from None
    try:
        listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if passed.type != socket.SOCK_STREAM or not listens:
            raise problem
        name = passed.getsockname()
        if passed.family == socket.AF_UNIX:
            return MonitorSpec("unix", path=str(name), is_server=True)
        if passed.family in (socket.AF_INET, socket.AF_INET6):
            return MonitorSpec("tcp", host=name[0], port=name[1], is_server=True)
        raise problem
    finally:
        passed.detach()

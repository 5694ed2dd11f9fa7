"""The text of ``-qmp``: where a monitor listens or connects to."""

from dataclasses import dataclass, replace

from migrationd.errors import ConfigError
from migrationd.units import PORT_MAX, parse_whole

UNIX_PATH_LIMIT = 107


@dataclass(frozen=True, slots=True)
class MonitorSpec:
    """One monitor.

    Attributes:
        kind: ``unix``, ``tcp`` or ``stdio``.
        path: Of a unix socket.
        host: Of a TCP socket.
        port: Of a TCP socket.
        is_server: Listen; otherwise connect out (``qmp-shell-wrap``).
        waits: Do not go on before the first client has connected.
        is_pretty: Spread output over indented lines.
        label: Id of its ``-chardev``; empty for ``-qmp``.
        fd: Listening socket that was inherited, or None.
    """

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0
    is_server: bool = False
    waits: bool = False
    is_pretty: bool = False
    label: str = ""
    fd: int | None = None


def parse_monitor_spec(text: str) -> MonitorSpec:
    """Parse QEMU's spelling: ``unix:PATH,server=on,wait=off``.

    Without ``server`` the monitor connects out, as in QEMU.

    Raises:
        ConfigError: With one clear line.
    """
    kind, _, rest = text.partition(":")
    kind, *options = kind.split(",") if kind.startswith("stdio") else (kind,)
    place = rest
    if kind != "stdio":
        place, *options = rest.split(",")
    if kind not in ("unix", "tcp", "stdio") or bool(place) == (kind == "stdio"):
        raise ConfigError(
            f"-qmp expects unix:PATH, tcp:HOST:PORT or stdio, with options, not '{text}'"
        )
    flags = {"server": False, "wait": True, "pretty": False}
    for option in options:
        flags |= _flag(option, text)
    spec = MonitorSpec(
        kind,
        is_server=flags["server"],
        waits=flags["server"] and flags["wait"],
        is_pretty=flags["pretty"],
    )
    if kind == "stdio":
        return replace(spec, is_server=False, waits=False)
    if kind == "unix":
        if len(place.encode()) > UNIX_PATH_LIMIT:
            raise ConfigError(f"-qmp: the path '{place}' is too long for a unix socket")
        return replace(spec, path=place)
    host, separator, port = place.rpartition(":")
    number = parse_whole(port, PORT_MAX)
    if not separator or number is None:
        raise ConfigError(f"-qmp expects tcp:HOST:PORT, not '{text}'")
    return replace(spec, host=host.strip("[]"), port=number)


def _flag(option: str, text: str) -> dict[str, bool]:
    name, separator, value = option.partition("=")
    if name == "nowait" and not separator:
        return {"wait": False}
    if name == "nodelay":
        return {}
    if name not in ("server", "wait", "pretty") or (value or "on") not in ("on", "off"):
        raise ConfigError(f"-qmp: unknown option '{option}' in '{text}'")
    return {name: (value or "on") == "on"}

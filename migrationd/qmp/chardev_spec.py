"""The texts of ``-chardev`` and ``-mon``: monitors the way management tools start them.

    -chardev socket,id=ID,path=PATH,server=on,wait=off     or fd=N, or host=HOST,port=PORT
    -chardev stdio,id=ID
    -mon chardev=ID,mode=control[,pretty=on]

Reference: options of QEMU 11.1; ``fd`` is a listening socket that the process inherits.
"""

from collections.abc import Sequence
from dataclasses import replace

from migrationd.errors import ConfigError
from migrationd.qmp.monitor_spec import UNIX_PATH_LIMIT, MonitorSpec
from migrationd.units import FD_MAX, PORT_MAX, parse_whole

_SOCKET = frozenset(("id", "path", "host", "port", "fd", "server", "wait", "nodelay"))
_FLAGS = frozenset(("server", "wait", "nodelay", "pretty"))


def monitors_of(chardevs: Sequence[str], mons: Sequence[str]) -> list[MonitorSpec]:
    """The monitors that ``-mon`` puts on character devices.

    Args:
        chardevs: Texts of ``-chardev``.
        mons: Texts of ``-mon``.

    Raises:
        ConfigError: With one clear line.
    """
    devices: dict[str, MonitorSpec] = {}
    for text in chardevs:
        device = _chardev(text)
        if device.label in devices:
            raise ConfigError(f"-chardev: duplicate ID '{device.label}'")
        devices[device.label] = device
    monitors = []
    for text in mons:
        values = _values("-mon", text, frozenset(("chardev", "mode", "pretty", "id")), "chardev")
        if values.get("mode", "readline") != "control":
            raise ConfigError(f"-mon: '{text}' is a human monitor: give mode=control")
        label = values.get("chardev", "")
        found = devices.pop(label, None)
        if found is None:
            raise ConfigError(f'-mon: chardev "{label}" not found, or taken already')
        monitors.append(replace(found, is_pretty=_is_on(values, "pretty", default=False)))
    if devices:
        raise ConfigError(f"-chardev: nothing uses '{next(iter(devices))}'; give a -mon")
    return monitors


def _chardev(text: str) -> MonitorSpec:
    backend, _, rest = text.partition(",")
    if backend not in ("socket", "stdio"):
        raise ConfigError(f"-chardev expects socket or stdio, not '{text}'")
    known = _SOCKET if backend == "socket" else frozenset(("id",))
    values = _values("-chardev", rest, known)
    label = values.get("id", "")
    if not label:
        raise ConfigError(f"-chardev: '{text}' has no id")
    if backend == "stdio":
        return MonitorSpec("stdio", label=label)
    is_server = _is_on(values, "server", default=False)
    spec = MonitorSpec(
        "unix",
        is_server=is_server,
        waits=is_server and _is_on(values, "wait", default=True),
        label=label,
    )
    if len({"path", "host", "fd"} & values.keys()) != 1:
        raise ConfigError(f"-chardev: '{text}' needs one of path, host with port, and fd")
    if "path" in values:
        if not 0 < len(values["path"].encode()) <= UNIX_PATH_LIMIT:
            raise ConfigError(f"-chardev: '{values['path']}' cannot be a unix socket")
        return replace(spec, path=values["path"])
    if "fd" in values:
        fd = parse_whole(values["fd"], FD_MAX)
        if not is_server or fd is None or fd <= 2:
            raise ConfigError(f"-chardev: '{text}': fd is a listening socket, with server=on")
        return replace(spec, fd=fd)
    port = parse_whole(values.get("port", ""), PORT_MAX)
    if port is None:
        raise ConfigError(f"-chardev: '{text}' expects a port number")
    return replace(spec, kind="tcp", host=values["host"], port=port)


def _values(option: str, text: str, known: frozenset[str], implied: str = "") -> dict[str, str]:
    values: dict[str, str] = {}
    for number, item in enumerate(text.split(",")):
        name, separator, value = item.partition("=")
        if not separator and number == 0 and implied:
            name, value = implied, name
        elif not separator:
            value = "on"
        if name == "nowait":
            name, value = "wait", "off"
        if name not in known or (name in _FLAGS and value not in ("on", "off")):
            raise ConfigError(f"{option}: unknown setting '{item}'")
        values[name] = value
    return values


def _is_on(values: dict[str, str], name: str, *, default: bool) -> bool:
    return values[name] == "on" if name in values else default

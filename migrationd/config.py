"""Start-up configuration: command line and TOML file to one frozen value.

Options are QEMU's where QEMU has them, with one dash or two. The texts of
mistakes are one line each; the caller prints them and exits with status 2.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from migrationd.errors import ConfigError
from migrationd.units import PORT_MAX, parse_size, parse_whole

TRACKING = ("auto", "pagemap", "userfaultfd")
LOG_LEVELS = ("debug", "info", "warning", "error")
COMPRESS_LEVELS = tuple("123456789")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class AddedFd:
    """``-add-fd``.

    Attributes:
        fd: An inherited descriptor.
        fdset_id: The set that it goes to.
        opaque: What ``query-fdsets`` calls it, or None.
    """

    fd: int
    fdset_id: int
    opaque: str | None = None


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Everything that the daemon is told at its start.

    Attributes:
        monitors: Texts of ``-qmp``, in order.
        chardevs: Texts of ``-chardev``.
        mons: Texts of ``-mon``, which put monitors on them.
        added_fds: Of ``-add-fd``.
        incoming: Texts of ``-incoming``: ``defer``, a URI or a JSON MigrationChannel.
        objects: Texts of ``-object``, in order.
        name: Guest name, or None.
        uuid: Guest UUID, or None.
        start_stopped: ``-S``.
        attach_path: Socket that the workload connects to; None for a parked guest.
        tracking: How an attached guest's writes are noted; one of ``TRACKING``.
        ram_dir: Directory in which a parked guest rests, or None for memory.
        keep: The parked guest is a template.
        ram_limit_bytes: Largest incoming guest, or None.
        ram_prealloc_bytes: Memory made ready for an incoming guest; 0 is none.
        learn_order: Remember in which order a guest asks for its pages, and follow it.
        start_postcopy: With ``postcopy-ram`` on, migrate without sending RAM first.
        compress_level: How a parked guest's pages are deflated for QEMU up to 9.0; None: not.
        only_migratable: Refuse devices that cannot migrate.
        metrics: Host and port to serve Prometheus metrics on, or None.
        log_level: One of ``LOG_LEVELS``.
        log_format: One of ``LOG_FORMATS``.
    """

    monitors: tuple[str, ...] = ()
    chardevs: tuple[str, ...] = ()
    mons: tuple[str, ...] = ()
    added_fds: tuple[AddedFd, ...] = ()
    incoming: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    name: str | None = None
    uuid: UUID | None = None
    start_stopped: bool = False
    attach_path: str | None = None
    tracking: str = TRACKING[0]
    ram_dir: Path | None = None
    keep: bool = False
    ram_limit_bytes: int | None = None
    ram_prealloc_bytes: int = 0
    learn_order: bool = True
    start_postcopy: bool = False
    compress_level: int | None = None
    only_migratable: bool = False
    metrics: tuple[str, int] | None = None
    log_level: str = "info"
    log_format: str = "text"


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    metavar: str
    help: str
    is_flag: bool = False
    is_repeatable: bool = False


OPTIONS: tuple[_Option, ...] = (
    _Option("qmp", "SPEC", "QMP monitor: unix:PATH, tcp:HOST:PORT[,server=on][,wait=off] or stdio",
            is_repeatable=True),
    _Option("qmp-pretty", "SPEC", "the same, with output over indented lines", is_repeatable=True),
    _Option("chardev", "SPEC", "a place for -mon: socket,id=ID,path=PATH (or fd=N, or "
            "host=HOST,port=PORT)[,server=on][,wait=off], or stdio,id=ID", is_repeatable=True),
    _Option("mon", "SPEC", "QMP monitor on one: chardev=ID,mode=control[,pretty=on]",
            is_repeatable=True),
    _Option("add-fd", "fd=N,set=M", "an inherited descriptor for /dev/fdset/M; [,opaque=TEXT]",
            is_repeatable=True),
    _Option("incoming", "ADDR", "take a guest: defer, a migration URI or a JSON MigrationChannel",
            is_repeatable=True),
    _Option("object", "SPEC", "make TLS credentials, a secret or authorization rules: "
            "TYPE,id=ID[,...] or JSON", is_repeatable=True),
    _Option("name", "NAME", "name of the guest, for query-name and -ram-dir"),
    _Option("uuid", "UUID", "UUID of the guest, for query-uuid and validate-uuid"),
    _Option("S", "", "an attached guest is not started when the migration ends", is_flag=True),
    _Option("guest", "KIND", "parked (default) or attach:PATH[,tracking=pagemap|userfaultfd]"),
    _Option("ram-dir", "DIR", "keep the parked guest durably in a file there"),
    _Option("keep", "", "the parked guest is a template: sending does not hand it over",
            is_flag=True),
    _Option("ram-limit", "SIZE", "refuse an incoming guest with more RAM, for example 64G"),
    _Option("ram-prealloc", "SIZE", "make memory ready for an incoming guest of this size at "
            "start, so that it comes faster"),
    _Option("learn-order", "on|off", "remember in which order a guest asks for its pages, and "
            "send them in that order next time (on)"),
    _Option("start-postcopy", "", "with postcopy-ram on, let the guest run at its destination "
            "at once and send memory afterwards", is_flag=True),
    _Option("compress", "LEVEL", "a parked guest leaves with pages deflated one by one (1 to 9), "
            "as QEMU 2.4 to 9.0 takes them with its capability compress"),
    _Option("only-migratable", "", "refuse devices that cannot migrate", is_flag=True),
    _Option("metrics", "HOST:PORT", "serve Prometheus metrics over HTTP"),
    _Option("config", "FILE", "read options from a TOML file; the command line wins"),
    _Option("log-level", "LEVEL", "debug, info, warning or error"),
    _Option("log-format", "FORMAT", "text or json"),
    _Option("version", "", "print the version and exit", is_flag=True),
    _Option("help", "", "print this help and exit", is_flag=True),
)  # fmt: skip

_BY_NAME = {option.name: option for option in OPTIONS}

Values = dict[str, list[str]]


def usage() -> str:
    """The text of ``-help``."""
    lines = ["usage: migrationd -qmp SPEC [option ...]", ""]
    for option in OPTIONS:
        head = f"  -{option.name} {option.metavar}".rstrip()
        lines.append(f"{head:<26}{option.help}")
    return "\n".join(lines)


def split_arguments(arguments: Sequence[str]) -> Values:
    """Sort a command line into option values.

    Returns:
        Option name without dashes to its values in order; flags have ``"on"``.

    Raises:
        ConfigError: On an unknown option, a missing value or a stray word.
    """
    values: Values = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            raise ConfigError(f"unexpected argument '{word}'; see -help")
        name, has_value, value = word.lstrip("-").partition("=")
        name = "help" if name == "h" else name
        option = _find(name, f"option '{word}'")
        if option.is_flag:
            value = value or "on"
        elif not has_value:
            if not rest:
                raise ConfigError(f"option '-{name}' needs a value")
            value = rest.pop(0)
        _add(values, option, value)
    return values


def load_config(arguments: Sequence[str]) -> DaemonConfig:
    """Turn a command line, and the file it may name, into a configuration.

    Raises:
        ConfigError: With one clear line.
    """
    values = split_arguments(arguments)
    if paths := values.pop("config", None):
        values = _read_file(Path(paths[-1])) | values
    return build_config(values)


def build_config(values: Values) -> DaemonConfig:
    """Check option values and make the configuration of them.

    Raises:
        ConfigError: With the option's name and what was expected.
    """
    config = DaemonConfig()
    for name, texts in values.items():
        config = _apply(config, name, texts)
    if not config.monitors and not config.mons:
        raise ConfigError(
            "no monitor: give at least one -qmp, for example -qmp unix:/run/guest.qmp"
        )
    if config.ram_dir is not None and config.name is None:
        raise ConfigError("-ram-dir needs -name: the guest is found again by its name")
    if config.ram_dir is not None and config.attach_path is not None:
        raise ConfigError("-ram-dir is for a parked guest: an attached one keeps its own memory")
    if config.keep and config.attach_path is not None:
        raise ConfigError("-keep is for a parked guest: an attached one runs in one place only")
    if config.ram_prealloc_bytes and (config.ram_dir or config.attach_path) is not None:
        raise ConfigError(
            "-ram-prealloc makes anonymous memory ready: not with -ram-dir or an attached guest"
        )
    for text in config.incoming:
        check_incoming_text(text)
    return config


def _size(name: str, text: str) -> int:
    try:
        size = parse_size(text)
    except (ValueError, OverflowError):
        size = 0
    if not 0 < size < 1 << 63:
        raise ConfigError(f"-{name} expects a size such as 64G, not '{text}'")
    return size


def check_incoming_text(text: str) -> None:
    """Refuse a JSON channel that is not JSON; addresses are checked by who opens them.

    Raises:
        ConfigError: If the text begins like JSON and is not.
    """
    if text.startswith("{"):
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"-incoming: not a JSON MigrationChannel: {error}") from None


def _find(name: str, what: str) -> _Option:
    option = _BY_NAME.get(name)
    if option is None:
        raise ConfigError(f"unknown {what}; see -help")
    return option


def _add(values: Values, option: _Option, value: str) -> None:
    texts = values.setdefault(option.name, [])
    if not option.is_repeatable:
        texts.clear()
    texts.append(value)


def _read_file(path: Path) -> Values:
    import tomllib  # late: most command lines name no file

    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not TOML: {error}") from None
    values: Values = {}
    for name, value in table.items():
        option = _find(name, f"option '{name}' in '{path}'")
        if option.name in ("config", "help", "version"):
            raise ConfigError(f"option '{name}' does not belong in a file ('{path}')")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                item = "on" if item else "off"
            elif not isinstance(item, str | int):
                raise ConfigError(f"option '{name}' in '{path}' expects text or a number")
            elif "\0" in str(item):
                raise ConfigError(f"option '{name}' in '{path}' has a NUL character in it")
            _add(values, option, str(item))
    return values


def _apply(config: DaemonConfig, name: str, texts: list[str]) -> DaemonConfig:
    text = texts[-1]
    match name:
        case "qmp":
            return replace(config, monitors=config.monitors + tuple(texts))
        case "qmp-pretty":
            pretty = tuple(f"{text},pretty=on" for text in texts)
            return replace(config, monitors=config.monitors + pretty)
        case "chardev":
            return replace(config, chardevs=tuple(texts))
        case "mon":
            return replace(config, mons=tuple(texts))
        case "add-fd":
            return replace(config, added_fds=tuple(_added_fd(text) for text in texts))
        case "incoming":
            return replace(config, incoming=tuple(texts))
        case "object":
            return replace(config, objects=tuple(texts))
        case "name":
            return replace(config, name=_guest_name(text))
        case "uuid":
            try:
                return replace(config, uuid=UUID(text))
            except ValueError:
                raise ConfigError(f"-uuid expects a UUID, not '{text}'") from None
        case "S":
            return replace(config, start_stopped=_flag(name, text))
        case "keep":
            return replace(config, keep=_flag(name, text))
        case "learn-order":
            return replace(config, learn_order=_flag(name, text))
        case "start-postcopy":
            return replace(config, start_postcopy=_flag(name, text))
        case "compress":
            return replace(config, compress_level=int(_choice(name, text, COMPRESS_LEVELS)))
        case "only-migratable":
            return replace(config, only_migratable=_flag(name, text))
        case "guest":
            path, tracking = _attachment(text)
            return replace(config, attach_path=path, tracking=tracking)
        case "ram-dir":
            return replace(config, ram_dir=Path(text))
        case "ram-limit":
            return replace(config, ram_limit_bytes=_size(name, text))
        case "ram-prealloc":
            return replace(config, ram_prealloc_bytes=_size(name, text))
        case "metrics":
            return replace(config, metrics=_host_and_port(name, text))
        case "log-level":
            return replace(config, log_level=_choice(name, text, LOG_LEVELS))
        case "log-format":
            return replace(config, log_format=_choice(name, text, LOG_FORMATS))
    raise ConfigError(f"unknown option '{name}'")


def _guest_name(text: str) -> str:
    first, *others = text.split(",")
    name = first.removeprefix("guest=")
    for other in others:
        key, _, value = other.partition("=")
        if key == "guest":
            name = value
        elif key not in ("process", "debug-threads"):
            raise ConfigError(f"-name: unknown setting '{key}'")
    if not name or "/" in name or "\0" in name or len(name.encode()) > 200:
        raise ConfigError(f"-name expects 1 to 200 bytes without '/', not '{name}'")
    return name


def _attachment(text: str) -> tuple[str | None, str]:
    if text == "parked":
        return None, TRACKING[0]
    kind, _, rest = text.partition(":")
    path, comma, option = rest.partition(",")
    tracking = TRACKING[0]
    if comma:
        tracking = _choice("guest attach", option, tuple(f"tracking={way}" for way in TRACKING))
        tracking = tracking.removeprefix("tracking=")
    if kind != "attach" or not path:
        raise ConfigError(f"-guest expects 'parked' or 'attach:PATH', not '{text}'")
    if len(path.encode()) > 107:
        raise ConfigError(f"-guest attach: '{path}' is too long for a socket's path")
    return path, tracking


def _host_and_port(name: str, text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    number = parse_whole(port, PORT_MAX)
    if not colon or number is None:
        raise ConfigError(f"-{name} expects HOST:PORT, not '{text}'")
    return host.removeprefix("[").removesuffix("]"), number


def _added_fd(text: str) -> AddedFd:
    values: dict[str, str] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in ("fd", "set", "opaque"):
            raise ConfigError(f"-add-fd: unknown setting '{key}'")
        values[key] = value
    numbers = [values.get(key, "") for key in ("fd", "set")]
    if not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise ConfigError(f"-add-fd expects fd=N,set=M[,opaque=TEXT], not '{text}'")
    if int(numbers[0]) <= 2:
        raise ConfigError("-add-fd: standard input, output and error cannot be given away")
    return AddedFd(int(numbers[0]), int(numbers[1]), values.get("opaque"))


def _flag(name: str, text: str) -> bool:
    return _choice(name, text, ("on", "off")) == "on"


def _choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"-{name} expects one of {', '.join(choices)}, not '{text}'")
    return text

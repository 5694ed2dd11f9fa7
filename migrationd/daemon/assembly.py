"""Guest, engines and options put together; imported late, for it is what takes time."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.control import GuestControl
from migrationd.daemon.shelter import Shelter
from migrationd.errors import ConfigError, MigrationdError, ObjectError, QMPError
from migrationd.guest.run_state import Owner
from migrationd.migration.options import MigrationOptions
from migrationd.objects.option import add_from_option
from migrationd.objects.registry import ObjectRegistry
from migrationd.qmp.context import Chardev, MigrationChannel
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.handlers.migrate import channel_of
from migrationd.qmp.models.base import parse_arguments
from migrationd.qmp.models.migration import MigrationChannelModel
from migrationd.transport.address import parse_uri
from migrationd.units import FD_MAX, parse_whole

log = logging.getLogger(__name__)

_TEXTS = ("transport", "type", "host", "port", "path", "cid", "str", "filename")
"""Members of a MigrationAddress that are text, also where they look like a number."""


async def assemble(
    config: DaemonConfig,
    bus: EventBus,
    *,
    on_quit: Callable[[], None],
    on_fatal: Callable[[], None],
    chardevs: Mapping[str, Chardev] | None = None,
) -> GuestControl:
    """Build the control of the one guest; a guest at rest is offered, ``-incoming`` opened.

    Raises:
        ConfigError: ``-incoming`` is no address, or an ``-object`` cannot be made.
        MigrationdError: The directory or the address cannot be used.
    """
    control = GuestControl(
        config,
        MigrationOptions(limits_writes=config.attach_path is not None),
        bus,
        SystemClock(),
        Shelter(config),
        on_quit=on_quit,
        on_fatal=on_fatal,
        chardevs=chardevs,
    )
    try:
        _make_objects(config, control.objects)
        if config.attach_path is not None:
            control.open_guest_socket(config.attach_path)
        if not _offer_saved_guest(config, control):
            await _start_incoming(config, control)
            if config.ram_prealloc_bytes:
                control.incoming.make_memory_ready()
    except BaseException:
        await control.aclose()
        raise
    return control


def _make_objects(config: DaemonConfig, objects: ObjectRegistry) -> None:
    for text in config.objects:
        try:
            add_from_option(objects, text)
        except ObjectError as error:
            raise ConfigError(f"-object {_without_data(text)}: {error}") from None


def _without_data(text: str) -> str:
    """Type and id, but never a secret's data."""
    return text.split(",", 1)[0] if not text.startswith("{") else "{...}"


def _offer_saved_guest(config: DaemonConfig, control: GuestControl) -> bool:
    """Offer the guest at rest; False if there is none to offer."""
    guest = control.find_saved()
    if guest is None:
        return False
    if guest.owner is Owner.HANDED_OVER and config.incoming:
        log.info("the guest at rest was handed over; the next one takes its place")
        guest.close()
        return False
    if guest.lazy is not None:
        control.adopt_lazy(guest, guest.lazy)
        log.warning(
            "the last daemon ended while the guest's memory followed it to %s: "
            "'migrate' with resume goes on",
            "where it runs" if guest.lazy.is_loaded else "where it may run",
        )
        return True
    control.adopt(guest)
    if guest.owner is Owner.HANDING_OVER:
        log.warning(
            "the last daemon ended while it handed this guest over: the destination may run "
            "it; if it does not, cont takes the guest back"
        )
    if config.incoming:
        log.warning("-incoming is ignored: the directory holds this guest already")
    return True


async def _start_incoming(config: DaemonConfig, control: GuestControl) -> None:
    channels = incoming_channels(config.incoming)
    for channel in channels:
        if channel.channel_type == "cpr":
            await _open_cpr(config, control, channel)
    channels = [channel for channel in channels if channel.channel_type == "main"]
    if not channels:
        return
    try:
        await control.incoming.start(channels, exit_on_error=True, fds=_number_fd)
    except MigrationdError as error:
        text = error.desc if isinstance(error, QMPError) else str(error)
        raise MigrationdError(f"-incoming {config.incoming[-1]}: {text}") from error


async def _open_cpr(config: DaemonConfig, control: GuestControl, channel: MigrationChannel) -> None:
    if config.ram_dir is not None:
        raise ConfigError("-ram-dir: memory that comes over a cpr channel stays where it is")
    try:
        await control.incoming.open_cpr(channel.address)
    except MigrationdError as error:
        raise MigrationdError(f"-incoming: cpr channel: {error}") from error


def incoming_channels(texts: Sequence[str]) -> list[MigrationChannel]:
    """Channels of ``-incoming``, at most one of each type: the last; none for ``defer``.

    Raises:
        ConfigError: A text is no address.
    """
    channels: dict[str, MigrationChannel] = {}
    for text in texts:
        if text == "defer":
            channels.pop("main", None)
            continue
        try:
            channel = _channel(text)
        except QMPError as error:
            raise ConfigError(f"-incoming {text}: {error.desc}") from None
        except MigrationdError as error:
            raise ConfigError(f"-incoming {text}: {error}") from None
        channels[channel.channel_type] = channel
    return list(channels.values())


def _channel(text: str) -> MigrationChannel:
    if text.startswith("{"):
        tree = {"channel-type": "main"} | json.loads(text)
    elif text.startswith(("main,", "cpr,")):
        tree = _channel_tree(text)
    else:
        return MigrationChannel("main", parse_uri(text))
    model: MigrationChannelModel = parse_arguments(MigrationChannelModel, tree)
    return channel_of(model)


def _channel_tree(text: str) -> dict[str, Any]:
    """``cpr,addr.transport=socket,addr.type=unix,addr.path=P`` as the tree of its JSON form."""
    kind, *settings = text.split(",")
    address: dict[str, object] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        name = key.removeprefix("addr.")
        address[name] = value if name in _TEXTS else _scalar(value)
    return {"channel-type": kind, "addr": address}


def _scalar(text: str) -> object:
    if text in ("on", "off"):
        return text == "on"
    number = parse_whole(text, 1 << 62)
    return text if number is None else number


def _number_fd(name: str) -> int:
    fd = parse_whole(name, FD_MAX)
    if fd is None:
        raise QMPError(f"File descriptor named '{name}' has not been found")
    return fd

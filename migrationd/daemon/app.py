"""The process: monitors, control, signals, and the order in which they end."""

import asyncio
import json
import logging
import signal
from collections.abc import Sequence

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.control import GuestControl
from migrationd.daemon.passed_sockets import pair_monitors
from migrationd.daemon.shelter import Shelter
from migrationd.errors import ConfigError, MigrationdError, QMPError
from migrationd.guest.run_state import Owner
from migrationd.linux.sd_notify import listen_fds, notify
from migrationd.migration.options import MigrationOptions
from migrationd.qmp.context import MigrationChannel
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.monitor_spec import parse_monitor_spec
from migrationd.qmp.server import MonitorServer
from migrationd.transport.address import address_from_qapi, parse_uri

log = logging.getLogger(__name__)


class Daemon:
    """One daemon, one guest.

    Args:
        config: Start-up configuration.

    Raises:
        ConfigError: An option cannot be used.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._monitor_specs = [parse_monitor_spec(text) for text in config.monitors]
        self._incoming = incoming_channels(config.incoming)
        self._ended: asyncio.Event
        self._fatal: MigrationdError | None = None

    async def run(self) -> int:
        """Serve until ``quit``, a signal or a fatal error.

        Returns:
            Exit status 0.

        Raises:
            MigrationdError: What ends the process with status 1.
        """
        self._ended = asyncio.Event()
        clock = SystemClock()
        bus = EventBus(clock)
        control = GuestControl(
            self._config,
            MigrationOptions(),
            bus,
            clock,
            Shelter(self._config),
            on_quit=self._ended.set,
            on_fatal=self._die,
        )
        monitors = pair_monitors(self._monitor_specs, listen_fds())
        servers = [MonitorServer(control, bus, spec, inherited) for spec, inherited in monitors]
        try:
            self._offer_saved_guest(control)
            await self._start_incoming(control)
            for server in servers:
                await server.start()
            self._watch_signals(bus)
            notify("READY=1")
            await self._ended.wait()
            notify("STOPPING=1")
        finally:
            await control.aclose()
            for server in servers:
                await server.aclose()
        if self._fatal is not None:
            raise self._fatal
        return 0

    def _offer_saved_guest(self, control: GuestControl) -> None:
        guest = control.find_saved()
        if guest is None:
            return
        if guest.owner is Owner.HANDED_OVER and self._config.incoming:
            log.info("the guest at rest was handed over; the next one takes its place")
            guest.close()
            return
        control.adopt(guest)
        if guest.owner is Owner.HANDING_OVER:
            log.warning(
                "the last daemon ended while it handed this guest over: the destination may run "
                "it; if it does not, cont takes the guest back"
            )
        if self._incoming:
            log.warning("-incoming is ignored: the directory holds this guest already")
            self._incoming = []

    async def _start_incoming(self, control: GuestControl) -> None:
        if not self._incoming:
            return
        try:
            await control.migrate_incoming(self._incoming, exit_on_error=True, fds=_number_fd)
        except MigrationdError as error:
            text = error.desc if isinstance(error, QMPError) else str(error)
            raise MigrationdError(f"-incoming {self._config.incoming[-1]}: {text}") from error

    def _watch_signals(self, bus: EventBus) -> None:
        def on_signal() -> None:
            bus.emit("SHUTDOWN", {"guest": False, "reason": "host-signal"})
            self._ended.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)

    def _die(self, error: MigrationdError) -> None:
        self._fatal = MigrationdError(f"load of migration failed: {error}")
        self._ended.set()


def incoming_channels(texts: Sequence[str]) -> list[MigrationChannel]:
    """Channels of ``-incoming``; none for ``defer``.

    Raises:
        ConfigError: A text is no address.
    """
    channels = []
    for text in texts:
        if text == "defer":
            continue
        try:
            if text.startswith("{"):
                tree = json.loads(text)
                address = address_from_qapi(tree["addr"])
                channels.append(MigrationChannel(tree.get("channel-type", "main"), address))
            else:
                channels.append(MigrationChannel("main", parse_uri(text)))
        except MigrationdError as error:
            raise ConfigError(f"-incoming {text}: {error}") from None
        except (KeyError, TypeError, AssertionError):
            raise ConfigError(f"-incoming {text}: not a MigrationChannel") from None
    if any(channel.channel_type != "main" for channel in channels):
        raise ConfigError("-incoming: only the main channel is taken in this version")
    return channels[-1:]


def _number_fd(name: str) -> int:
    if not name.isdigit() or int(name) > 1 << 20:
        raise QMPError(f"File descriptor named '{name}' has not been found")
    return int(name)

"""The process: monitors, signals, and the order in which things begin and end.

What a monitor needs to greet is light; guest, engines and models are imported on a
thread while the first client connects.
"""

import asyncio
import functools
import gc
import importlib
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from migrationd.clock import SystemClock
from migrationd.config import DaemonConfig
from migrationd.daemon.passed_sockets import pair_monitors
from migrationd.errors import ConfigError, MigrationdError
from migrationd.linux.malloc import trim
from migrationd.linux.sd_notify import listen_fds, notify
from migrationd.qmp.chardev_spec import monitors_of
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.models.no_plugins import forgo_plugins
from migrationd.qmp.monitor_spec import parse_monitor_spec
from migrationd.qmp.server import Dispatch, MonitorServer
from migrationd.transport.fdset import FDSETS

if TYPE_CHECKING:
    from migrationd.daemon.control import GuestControl
    from migrationd.daemon.metrics import MetricsServer


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
        self._monitor_specs += monitors_of(config.chardevs, config.mons)
        self._ended: asyncio.Event
        self._fatal: MigrationdError | None = None

    async def run(self) -> int:
        """Serve until ``quit``, a signal or a fatal error.

        Returns:
            Exit status 0.

        Raises:
            MigrationdError: What ends the process with status 1; ConfigError: with 2.
        """
        self._ended = asyncio.Event()
        self._add_fds()
        bus = EventBus(SystemClock())
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        monitors = pair_monitors(self._monitor_specs, listen_fds())
        servers = [MonitorServer(dispatch, bus, spec, inherited) for spec, inherited in monitors]
        control: GuestControl | None = None
        metrics: MetricsServer | None = None
        try:
            # As in QEMU, what -incoming names is open before a monitor accepts commands.
            if self._opens_before_monitors:
                control = await self._assemble(bus, dispatch, servers)
            for server in servers:
                await server.start()
            if control is None:
                control = await self._assemble(bus, dispatch, servers)
            if self._config.metrics is not None:
                metrics = await self._serve_metrics(*self._config.metrics, control)
            self._watch_signals(bus)
            notify("READY=1")
            await self._ended.wait()
            notify("STOPPING=1")
        finally:
            if metrics is not None:
                await metrics.aclose()
            if control is not None:
                await control.aclose()
            for server in servers:
                await server.aclose()
        if self._fatal is not None:
            raise self._fatal
        return 0

    def _add_fds(self) -> None:
        for added in self._config.added_fds:
            try:
                os.set_inheritable(added.fd, False)
            except OSError as error:
                raise ConfigError(f"-add-fd fd={added.fd}: {error.strerror}") from None
            FDSETS.add(added.fd, added.fdset_id, added.opaque)

    @property
    def _opens_before_monitors(self) -> bool:
        config = self._config
        return config.ram_dir is not None or any(text != "defer" for text in config.incoming)

    async def _assemble(
        self,
        bus: EventBus,
        dispatch: "asyncio.Future[Dispatch]",
        servers: Sequence[MonitorServer],
    ) -> "GuestControl":
        # NumPy's threads for linear algebra, of which there is none here, cost a start dearly.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        forgo_plugins()
        await asyncio.to_thread(importlib.import_module, "migrationd.qmp.dispatch")
        await asyncio.to_thread(importlib.import_module, "migrationd.daemon.assembly")
        from migrationd.daemon.assembly import assemble
        from migrationd.qmp.dispatch import answer

        control = await assemble(
            self._config,
            bus,
            on_quit=self._ended.set,
            on_fatal=self._die,
            chardevs={
                server.label or f"compat_monitor{n}": server for n, server in enumerate(servers)
            },
        )
        dispatch.set_result(functools.partial(answer, control))
        gc.collect()
        gc.freeze()  # what was made so far stays, and is never looked at again
        gc.enable()
        trim()
        return control

    async def _serve_metrics(
        self, host: str, port: int, control: "GuestControl"
    ) -> "MetricsServer":
        await asyncio.to_thread(importlib.import_module, "migrationd.daemon.metrics")
        from migrationd.daemon.metrics import MetricsServer

        return MetricsServer(host, port, control)

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

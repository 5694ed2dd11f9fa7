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
from migrationd.errors import ConfigError
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
        self._control: GuestControl | None = None
        self._metrics: MetricsServer | None = None
        self._exit_status = 0

    async def run(self) -> int:
        """Serve until ``quit``, a signal or a fatal error.

        Returns:
            Exit status: 0, or 1 after an incoming migration that failed with ``exit-on-error``;
            why has been logged.

        Raises:
            MigrationdError: What ends the process with status 1; ConfigError: with 2.
        """
        self._ended = asyncio.Event()
        self._add_fds()
        bus = EventBus(SystemClock())
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        monitors = pair_monitors(self._monitor_specs, listen_fds())
        servers = [MonitorServer(dispatch, bus, spec, inherited) for spec, inherited in monitors]
        self._watch_signals(bus)
        starting = asyncio.create_task(self._start(bus, dispatch, servers), name="start")
        ending = asyncio.create_task(self._ended.wait(), name="end")
        try:
            await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                notify("READY=1")
                await ending
            notify("STOPPING=1")
        finally:
            starting.cancel()
            ending.cancel()
            await asyncio.gather(starting, ending, return_exceptions=True)
            if self._metrics is not None:
                await self._metrics.aclose()
            if self._control is not None:
                await self._control.aclose()
            for server in servers:
                await server.aclose()
        return self._exit_status

    async def _start(
        self,
        bus: EventBus,
        dispatch: "asyncio.Future[Dispatch]",
        servers: Sequence[MonitorServer],
    ) -> None:
        """Open everything; with ``wait=on`` that takes until a client is there."""
        # As in QEMU, what -incoming names is open before a monitor accepts commands.
        if self._opens_before_monitors:
            self._control = await self._assemble(bus, dispatch, servers)
        for server in servers:
            await server.start()
        if self._control is None:
            self._control = await self._assemble(bus, dispatch, servers)
        if self._config.metrics is not None:
            self._metrics = await self._serve_metrics(*self._config.metrics, self._control)

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
            on_fatal=self._fail,
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

    def _fail(self) -> None:
        self._exit_status = 1
        self._ended.set()

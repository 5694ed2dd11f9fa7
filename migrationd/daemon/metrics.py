"""Prometheus metrics over HTTP (``-metrics HOST:PORT``).

A scrape asks the event loop for one snapshot, so that it never sees half a change and
never waits for a page. Names follow Prometheus' conventions: base units, ``_total`` for
counters. The library is imported when the option is used.
"""

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Protocol, get_args
from wsgiref.simple_server import WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler
from prometheus_client.registry import Collector

from migrationd import __version__
from migrationd.errors import MigrationdError
from migrationd.guest.held import HeldGuest
from migrationd.guest.run_state import Owner
from migrationd.migration.info import MigrationInfo
from migrationd.qmp.models.migration import MigrationStatus

log = logging.getLogger(__name__)

SNAPSHOT_WAIT_S = 5.0
"""A scrape gives up when the event loop has not answered by then."""

REQUEST_WAIT_S = 10.0
"""A connection that says nothing for this long is closed."""


class Informed(Protocol):
    """One half of the control."""

    def info(self) -> MigrationInfo | None:
        """Its part of ``query-migrate``."""


class Gauged(Protocol):
    """What is measured; read on the event loop."""

    @property
    def guest(self) -> HeldGuest | None:
        """The held guest."""

    @property
    def run_state(self) -> str:
        """QMP RunState."""

    @property
    def guest_name(self) -> str | None:
        """Name of the guest."""

    @property
    def outgoing(self) -> Informed:
        """Knows the source's part."""

    @property
    def incoming(self) -> Informed:
        """Knows the destination's part."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    name: str | None
    run_state: str
    owner: Owner | None
    ram_bytes: int
    present_bytes: int
    outgoing: MigrationInfo | None
    incoming: MigrationInfo | None


class MetricsServer:
    """Serves the metrics until it is closed.

    Args:
        host: Address to listen on; every one if empty.
        port: 0 for one that is free.
        gauged: The guest and its migrations.

    Raises:
        MigrationdError: The address cannot be bound.
    """

    def __init__(self, host: str, port: int, gauged: Gauged) -> None:
        registry = CollectorRegistry()
        registry.register(_GuestCollector(gauged, asyncio.get_running_loop()))
        try:
            self._server: WSGIServer = make_server(
                host, port, make_wsgi_app(registry), _server_class(host), _Handler
            )
        except OSError as error:
            raise MigrationdError(f"-metrics {host}:{port}: {error.strerror or error}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True
        )
        self._thread.start()
        log.info("metrics on port %d of %s", self.port, host or "every address")

    @property
    def port(self) -> int:
        """The bound port."""
        return self._server.server_port

    async def aclose(self) -> None:
        """Stop serving; a scrape that is under way may end without an answer."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    """Answers each scrape on a thread of its own, which ends with the daemon."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        # The base class looks the host's name up, which may take seconds.
        super(WSGIServer, self).server_bind()
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        # The base class prints a traceback.
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("a scrape was cut off: %s", error)
        else:
            log.error("internal error in a scrape", exc_info=error)


class _ServerOverIPv6(_Server):
    address_family = socket.AF_INET6


def _server_class(host: str) -> type[_Server]:
    """What can listen on an address; IPv4 where the host has both, or none is named."""
    if not host:
        return _Server
    families = {info[0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return _Server if socket.AF_INET in families else _ServerOverIPv6


class _Handler(_SilentHandler):
    timeout = REQUEST_WAIT_S


class _GuestCollector(Collector):
    def __init__(self, gauged: Gauged, loop: asyncio.AbstractEventLoop) -> None:
        self._gauged = gauged
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        """Metrics of one scrape; none when the event loop does not answer."""
        build = InfoMetricFamily("migrationd_build", "Version of the daemon.")
        build.add_metric([], {"version": __version__})
        yield build
        try:
            snapshot = asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop).result(
                SNAPSHOT_WAIT_S
            )
        except (FutureTimeoutError, RuntimeError):  # busy for too long, or closed
            return
        yield from _guest_metrics(snapshot)
        yield from _migration_metrics(snapshot)

    async def _snapshot(self) -> _Snapshot:
        gauged = self._gauged
        guest = gauged.guest
        return _Snapshot(
            name=gauged.guest_name,
            run_state=gauged.run_state,
            owner=guest.owner if guest else None,
            ram_bytes=guest.ram_bytes if guest else 0,
            present_bytes=guest.present_bytes if guest else 0,
            outgoing=gauged.outgoing.info(),
            incoming=gauged.incoming.info(),
        )


def _guest_metrics(snapshot: _Snapshot) -> Iterator[Metric]:
    info = InfoMetricFamily("migrationd_guest", "Name and run state of the guest.")
    info.add_metric([], {"name": snapshot.name or "", "run_state": snapshot.run_state})
    yield info
    owner = StateSetMetricFamily(
        "migrationd_guest_owner", "Who may run the guest, as recorded here."
    )
    owner.add_metric([], {state.value: state is snapshot.owner for state in Owner})
    yield owner
    yield GaugeMetricFamily(
        "migrationd_guest_ram_bytes", "RAM of all blocks.", value=snapshot.ram_bytes
    )
    yield GaugeMetricFamily(
        "migrationd_guest_ram_present_bytes",
        "RAM that is not zero pages.",
        value=snapshot.present_bytes,
    )


def _migration_metrics(snapshot: _Snapshot) -> Iterator[Metric]:
    status = StateSetMetricFamily(
        "migrationd_migration_status", "MigrationStatus of each side.", labels=["side"]
    )
    for side, info in (("outgoing", snapshot.outgoing), ("incoming", snapshot.incoming)):
        now = info.status if info else "none"
        status.add_metric([side], {name: name == now for name in get_args(MigrationStatus)})
    yield status
    info = snapshot.outgoing
    if info is None or info.ram is None:
        return
    ram = info.ram
    for name, text, count in (
        ("transferred_bytes", "Bytes sent.", ram.transferred),
        ("precopy_bytes", "Bytes sent before the switchover.", ram.precopy_bytes),
        ("downtime_bytes", "Bytes sent while the guest stood still.", ram.downtime_bytes),
        ("postcopy_bytes", "Bytes sent after the guest ran on.", ram.postcopy_bytes),
        ("multifd_bytes", "Bytes sent over multifd channels.", ram.multifd_bytes),
        ("normal_pages", "Pages sent with their content.", ram.normal),
        ("zero_pages", "Zero pages sent.", ram.duplicate),
        ("postcopy_requests", "Pages that the destination asked for.", ram.postcopy_requests),
        ("passes", "Passes over RAM.", ram.dirty_sync_count),
    ):
        yield CounterMetricFamily(f"migrationd_outgoing_{name}", text, value=count)
    for name, text, value in (
        ("remaining_bytes", "RAM still to send.", float(ram.remaining)),
        ("rate_bits_per_second", "Rate of the last while.", ram.mbps * 1e6),
        ("expected_downtime_seconds", "Expected.", _seconds(info.expected_downtime_ms)),
        ("downtime_seconds", "Of the completed migration.", _seconds(info.downtime_ms)),
        ("duration_seconds", "Since its start.", _seconds(info.total_time_ms)),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"migrationd_outgoing_{name}", text, value=value)


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000

"""What a scrape sees."""

import asyncio
import logging
import socket
import struct
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrationd.daemon.metrics import MetricsServer
from migrationd.errors import MigrationdError
from migrationd.guest.base import GuestIdentity
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.run_state import Owner
from migrationd.migration.info import MigrationInfo, RamStats
from tests.support.deadline import until


class Informed:
    """One half of the control."""

    def __init__(self) -> None:
        self.migration: MigrationInfo | None = None

    def info(self) -> MigrationInfo | None:
        return self.migration


class Gauged:
    """A guest and migrations of the test's choice."""

    def __init__(self) -> None:
        self.guest: ParkedGuest | None = None
        self.run_state = "inmigrate"
        self.guest_name: str | None = 'a "name"'
        self.outgoing = Informed()
        self.incoming = Informed()


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(server: MetricsServer, host: str = "127.0.0.1") -> Samples:
    def get() -> str:
        url = f"http://{host}:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return str(reply.read().decode())

    text = await asyncio.to_thread(get)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, metric: str, /, **labels: str) -> float | None:
    return samples.get((metric, frozenset(labels.items())))


async def test_an_empty_daemon_and_a_guest_on_its_way() -> None:
    gauged = Gauged()
    server = MetricsServer("127.0.0.1", 0, gauged)
    try:
        samples = await scrape(server)
        assert value(samples, "migrationd_guest_info", name='a "name"', run_state="inmigrate") == 1
        assert value(samples, "migrationd_guest_ram_bytes") == 0
        status = {"migrationd_migration_status": "none"}
        assert value(samples, "migrationd_migration_status", side="outgoing", **status) == 1
        assert value(samples, "migrationd_outgoing_transferred_bytes_total") is None

        spec = RamBlockSpec("ram", 1 << 20, 4096)
        gauged.guest = ParkedGuest.create(
            GuestIdentity(), [spec], lambda _, spec: AnonymousMemory(spec.used_length, 4096)
        )
        gauged.guest.ram[0].place_batch(
            np.arange(3, dtype=np.int64), np.ones((3, 4096), np.uint8), True
        )
        gauged.run_state = "finish-migrate"
        gauged.outgoing.migration = MigrationInfo(
            "active",
            total_time_ms=1500,
            expected_downtime_ms=300,
            ram=RamStats(transferred=12345, remaining=4096, normal=3, mbps=8.0),
        )
        samples = await scrape(server)
        assert value(samples, "migrationd_guest_ram_bytes") == 1 << 20
        assert value(samples, "migrationd_guest_ram_present_bytes") == 3 * 4096
        owner = {"migrationd_guest_owner": Owner.HELD.value}
        assert value(samples, "migrationd_guest_owner", **owner) == 1
        status = {"migrationd_migration_status": "active"}
        assert value(samples, "migrationd_migration_status", side="outgoing", **status) == 1
        assert value(samples, "migrationd_outgoing_transferred_bytes_total") == 12345
        assert value(samples, "migrationd_outgoing_rate_bits_per_second") == 8e6
        assert value(samples, "migrationd_outgoing_expected_downtime_seconds") == 0.3
        assert value(samples, "migrationd_outgoing_downtime_seconds") is None
        gauged.guest.close()
    finally:
        await server.aclose()


async def test_a_client_that_says_nothing_does_not_hold_the_end_up() -> None:
    server = MetricsServer("127.0.0.1", 0, Gauged())
    with socket.create_connection(("127.0.0.1", server.port)):
        async with asyncio.timeout(5):
            assert await scrape(server)
            await server.aclose()


async def test_a_client_that_resets_its_connection_is_no_error(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "migrationd")
    server = MetricsServer("127.0.0.1", 0, Gauged())
    try:
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(b"GET /met")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await until(lambda: "a scrape was cut off" in caplog.text, "it is noticed")
        assert await scrape(server)
    finally:
        await server.aclose()
    assert capfd.readouterr().err == ""


async def test_an_address_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MigrationdError, match=f"-metrics 127.0.0.1:{port}: "):
            MetricsServer("127.0.0.1", port, Gauged())


async def test_metrics_over_ipv6() -> None:
    server = MetricsServer("::1", 0, Gauged())
    try:
        samples = await scrape(server, "[::1]")
    finally:
        await server.aclose()
    assert value(samples, "migrationd_guest_ram_bytes") == 0

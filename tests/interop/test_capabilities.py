"""What a source may switch on: taken, or refused with the guest running on where it was."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from migrationd.ctl.boot_guest import BootGuest
from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.qemu_process import QemuProcess, find_qemu, qemu_version
from tests.support.moves import Host, check_runs_on, memory_digest, send
from tests.support.parked_file import holder
from tests.support.releases import qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "capabilities of a source QEMU"
UUID = "4a4e5f2e-2d5c-4c7b-9d57-0123456789ab"
OTHER_UUID = "4a4e5f2e-2d5c-4c7b-9d57-0123456789ac"


@pytest.fixture(
    params=[
        "path",
        *(pytest.param(version, marks=pytest.mark.matrix) for version in ("10.0", "11.1")),
    ]
)
def host(request: pytest.FixtureRequest) -> Host:
    return Host(qemu_binary(None if request.param == "path" else request.param))


def report(config: pytest.Config, host: Host, capability: str, outcome: str) -> None:

    add_row(
        config,
        TABLE,
        (qemu_version(host.binary), capability, outcome),
        head=("QEMU", "capability", "outcome"),
    )


async def begin(
    host: Host,
    directory: Path,
    closing: list[object],
    capabilities: dict[str, bool],
    *,
    max_bandwidth: int = 0,
    parameters: dict[str, object] | None = None,
    daemon_capabilities: dict[str, bool] | None = None,
    arguments: tuple[str, ...] = (),
) -> tuple[QemuProcess, DaemonProcess]:
    """Begin to move a running guest into a daemon."""
    daemon = await DaemonProcess.start(incoming="defer", arguments=arguments)
    closing.append(daemon)
    if daemon_capabilities:
        await daemon.set_capabilities(daemon_capabilities)
    uri = f"unix:{directory}/in.sock"
    await daemon.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    source = await host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    await source.set_capabilities({"return-path": True, **capabilities})
    if parameters:
        await source.set_parameters(parameters)
    await source.migrate(uri, max_bandwidth=max_bandwidth)
    return source, daemon


async def arrive(source: QemuProcess, daemon: DaemonProcess) -> None:
    await source.wait_migration("completed")
    await daemon.wait_migration("completed")


async def go_on(
    source: QemuProcess, daemon: DaemonProcess, host: Host, directory: Path,
    closing: list[object], capabilities: dict[str, bool] | None = None,
) -> None:  # fmt: skip
    """Send the guest to another QEMU with these capabilities on both ends."""
    digest = await memory_digest(source, host)
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    chosen = {"events": True, "return-path": True, **(capabilities or {})}
    await target.set_capabilities(chosen)
    await daemon.set_capabilities(chosen)
    uri = f"unix:{directory}/out.sock"
    await target.execute("migrate-incoming", {"uri": uri})
    await send(daemon, target, uri, return_path=True)
    assert await memory_digest(target, host) == digest
    await target.execute("cont")
    await check_runs_on(source.serial, target, host)


async def stays(source: QemuProcess, daemon: DaemonProcess) -> str:
    """The load fails, the guest runs on at its source; what the daemon says."""
    await source.wait_migration("failed")
    await source.wait_run_state("running")
    printed = len(source.serial)
    await source.wait_serial(printed + 2)
    info = await daemon.wait_migration("failed")
    assert await daemon.run_state() == "inmigrate"
    return str(info["error-desc"])


async def test_xbzrle(
    host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Several passes over a guest that dirties few bytes per page, most of them as deltas."""
    host = replace(host, guest=BootGuest(counted_pages=1500, filled_pages=1024, pages_per_s=6000))
    source, daemon = await begin(
        host, tmp_path, closing, {"xbzrle": True}, max_bandwidth=12 << 20,
        parameters={"downtime-limit": 1, "xbzrle-cache-size": 64 << 20},
    )  # fmt: skip
    deltas = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while deltas < 300:
                info = await source.query_migrate()
                cache = info.get("xbzrle-cache", {})
                deltas = cache.get("pages", 0)  # type: ignore[attr-defined]
                if info["status"] == "completed":
                    break
                await asyncio.sleep(0.02)
    await source.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
    await arrive(source, daemon)
    assert deltas >= 300
    await go_on(source, daemon, host, tmp_path, closing)
    report(request.config, host, "xbzrle", f"moved, {deltas} pages as deltas")


@pytest.mark.parametrize(
    "capabilities",
    [
        {"auto-converge": True},
        {"pause-before-switchover": True},
        {"late-block-activate": True},
    ],
    ids=lambda value: next(iter(value)),
)
async def test_taken(
    capabilities: dict[str, bool], host: Host, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    source, daemon = await begin(host, tmp_path, closing, capabilities)
    if "pause-before-switchover" in capabilities:
        await source.wait_migration("pre-switchover")
        await source.execute("migrate-continue", {"state": "pre-switchover"})
    await arrive(source, daemon)
    await go_on(source, daemon, host, tmp_path, closing)
    report(request.config, host, next(iter(capabilities)), "moved")


async def test_pause_before_switchover_on_the_way_out(
    parked_file: tuple[Path, str, str], qemu_host: Host, tmp_path: Path, closing: list[object]
) -> None:
    daemon = await holder(parked_file[0], closing)
    await daemon.set_capabilities({"return-path": True, "pause-before-switchover": True})
    uri = f"unix:{tmp_path}/out.sock"
    target = await qemu_host.start("QEMU B", incoming=uri, paused=True)
    closing.append(target)
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("pre-switchover")
    with pytest.raises(Exception, match="not in expected state"):
        await daemon.execute("migrate-continue", {"state": "device"})
    assert await daemon.run_state() == "finish-migrate"
    await daemon.execute("migrate-continue", {"state": "pre-switchover"})
    await daemon.wait_migration("completed")
    await target.wait_migration("completed")
    assert await memory_digest(target, qemu_host) == parked_file[1]


async def test_switchover_ack(
    host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Without the daemon's ACK the source would never switch over (machines up to 11.0)."""
    if host.binary == find_qemu("7.2"):
        pytest.skip("QEMU 7.2 has no switchover-ack")
    acks = {"return-path": True, "switchover-ack": True}
    source, daemon = await begin(host, tmp_path, closing, acks, daemon_capabilities=acks)
    await arrive(source, daemon)
    await go_on(source, daemon, host, tmp_path, closing, acks)
    report(request.config, host, "switchover-ack", "moved")


@pytest.mark.parametrize("matches", [True, False], ids=["same", "other"])
async def test_validate_uuid(
    matches: bool, host: Host, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    host = replace(host, arguments=(*host.arguments, "-uuid", UUID))
    checked = {"validate-uuid": True}
    source, daemon = await begin(
        host, tmp_path, closing, checked, daemon_capabilities=checked,
        arguments=("-uuid", UUID if matches else OTHER_UUID),
    )  # fmt: skip
    if matches:
        await arrive(source, daemon)
        await go_on(source, daemon, host, tmp_path, closing, checked)
        report(request.config, host, "validate-uuid, the same", "moved")
    else:
        assert "UUID" in await stays(source, daemon)
        report(request.config, host, "validate-uuid, another", "refused, runs on at the source")


async def test_multifd_is_refused(
    host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """Its channels are not taken, and the source must not wait for them for ever."""
    if qemu_version(host.binary) == "7.2":
        pytest.skip("QEMU 7.2's source may itself wait for ever for a channel that was refused")
    source, daemon = await begin(host, tmp_path, closing, {"multifd": True})
    await stays(source, daemon)
    report(request.config, host, "multifd", "refused, runs on at the source")


async def test_postcopy_is_refused_while_the_source_can_still_go_back(
    host: Host, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    """A daemon without postcopy must say so at the ADVISE: after the switch it is too late."""
    source, daemon = await begin(
        host, tmp_path, closing, {"postcopy-ram": True}, max_bandwidth=1 << 20
    )
    text = await stays(source, daemon)
    assert "postcopy" in text
    report(request.config, host, "postcopy-ram", "refused, runs on at the source")

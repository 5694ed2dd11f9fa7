"""QEMU -> migrationd -> QEMU over multifd channels: the guest goes on and its RAM is the same."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.moves import (
    Host,
    check_runs_on,
    incoming_uri,
    memory_digest,
    park,
    send,
    source_uri,
)
from tests.support.releases import RELEASES, default_release, qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "multifd: QEMU -> migrationd -> QEMU"
HEAD = (
    "in from", "out to", "machine", "channels", "method", "zero pages", "transport",
    "RAM equal", "goes on",
)  # fmt: skip
UUID = "11223344-5566-7788-99aa-bbccddeeff00"


@dataclass(frozen=True)
class Case:
    """One move in and out.

    Attributes:
        source: Version of the QEMU that the guest comes from.
        target: Version of the QEMU that it goes to.
        machine: Machine type of both.
        channels: ``multifd-channels``.
        method: ``multifd-compression``.
        zeros: ``zero-page-detection`` of both sources.
        transport: Of both moves.
        zero_copy: ``zero-copy-send`` on the way out.
        has_uuid: Whether the QEMUs have a UUID.
    """

    source: str
    target: str
    machine: str = "pc"
    channels: int = 2
    method: str = "none"
    zeros: str = "multifd"
    transport: str = "tcp"
    zero_copy: bool = False
    has_uuid: bool = False

    @property
    def name(self) -> str:
        words = [self.source, self.target, self.machine, str(self.channels), self.method]
        words += [self.zeros, self.transport]
        words += ["zerocopy"] * self.zero_copy + ["uuid"] * self.has_uuid
        return "-".join(words)


def cases() -> list[object]:
    """A few with the QEMU on the path; the rest is the full matrix."""
    default = default_release()
    short = [
        Case(default, default, channels=2, method="none", has_uuid=True),
        Case(default, default, "q35", channels=1, method="zlib", transport="unix"),
        Case(default, default, channels=8, method="zstd", zeros="legacy"),
    ]
    wide = [
        Case(version, version, channels=channels, method=method, transport=transport)
        for version in RELEASES
        for method in ("none", "zlib", "zstd")
        for channels, transport in ((1, "unix"), (2, "tcp"), (8, "tcp"))
    ]
    wide += [Case(version, version, channels=255) for version in RELEASES]
    wide += [Case(version, version, zero_copy=True) for version in RELEASES]
    wide += [
        Case(version, version, zeros=zeros, method=method)
        for version in ("10.0", "11.1")
        for zeros in ("none", "legacy")
        for method in ("none", "zstd")
    ]
    wide += [
        Case(source, target, "pc-i440fx-7.2", channels=3, method=method)
        for source in RELEASES
        for target in RELEASES
        for method in ("none", "zstd")
        if source != target or source != "7.2"
    ]
    wide += [
        Case("10.0", "11.1", machine, channels=3, zeros="multifd")
        for machine in ("pc-i440fx-8.0", "pc-i440fx-8.1", "pc-i440fx-8.2", "pc-i440fx-9.0")
    ]
    wide += [Case("10.0", "11.1", "pc-i440fx-10.0"), Case("11.1", "10.0", "pc-q35-10.0")]
    wide += [Case(version, version, has_uuid=True) for version in RELEASES]
    marks = [pytest.mark.matrix]
    out: list[object] = [pytest.param(case, id=case.name) for case in short]
    names = {case.name for case in short}
    for case in wide:
        if case.name not in names:
            names.add(case.name)
            out.append(pytest.param(case, id=case.name, marks=marks))
    return out


@pytest.mark.parametrize("case", cases())
async def test_move(
    case: Case, tmp_path: Path, closing: list[object], request: pytest.FixtureRequest
) -> None:
    hosts = []
    for version in (case.source, case.target):
        arguments = ("-uuid", UUID) if case.has_uuid else ()
        hosts.append(Host(qemu_binary(version), case.machine, arguments=arguments))
    capabilities = {"multifd": True, "events": True, "return-path": True}
    parameters: dict[str, object] = {
        "multifd-channels": case.channels,
        "multifd-compression": case.method,
    }

    source = await hosts[0].start("QEMU A")
    closing.append(source)
    daemon = await DaemonProcess.start(incoming="defer")
    closing.append(daemon)
    await daemon.set_capabilities({"multifd": True, "events": True})
    await daemon.set_parameters(parameters)
    uri_in = incoming_uri(case.transport, tmp_path, "in")
    await daemon.execute("migrate-incoming", {"uri": uri_in})
    await source.wait_serial(3)
    await source.set_capabilities(capabilities)
    source_zeros = {} if case.source == "7.2" else {"zero-page-detection": case.zeros}
    await source.set_parameters(parameters | source_zeros)
    await park(source, daemon, await source_uri(daemon, uri_in), return_path=True)
    before = source.serial
    digest = await memory_digest(source, hosts[0])
    if case.has_uuid:
        assert await daemon.execute("query-uuid") == {"UUID": UUID}

    target = await hosts[1].start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await target.set_capabilities(capabilities)
    await target.set_parameters(parameters)
    uri_out = incoming_uri(case.transport, tmp_path, "out")
    await target.execute("migrate-incoming", {"uri": uri_out})
    await daemon.set_parameters({"zero-page-detection": case.zeros})
    if case.zero_copy:
        await daemon.set_capabilities({"zero-copy-send": True})
    await send(daemon, target, await source_uri(target, uri_out), return_path=True)
    ram = (await daemon.query_migrate())["ram"]
    assert 0 < ram["multifd-bytes"] < ram["transferred"]
    if case.zero_copy:
        # Over loopback the kernel copies after all, and says so.
        assert ram["dirty-sync-missed-zero-copy"] > 0
    assert await memory_digest(target, hosts[1]) == digest
    await target.execute("cont")
    passes = await check_runs_on(before, target, hosts[1])
    report(request.config, case, passes)


def report(config: pytest.Config, case: Case, passes: int) -> None:
    zeros = "zero-copy" if case.zero_copy else case.zeros
    row = (case.source, case.target, case.machine, str(case.channels), case.method, zeros)
    add_row(config, TABLE, (*row, case.transport, "yes", f"yes, {passes} passes"), head=HEAD)

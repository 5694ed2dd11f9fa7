"""TLS between real QEMUs and migrationd: every connection is encrypted, or none is made."""

import asyncio
import socket
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerProcess
from migrationd.ctl.qemu_process import QemuProcess
from tests.support.certificates import (
    Pair,
    make_authority,
    make_directory,
    make_leaf,
    write_directory,
)
from tests.support.deadline import until
from tests.support.moves import Host, memory_digest, park, source_uri
from tests.support.releases import RELEASES, qemu_binary, release_cases
from tests.support.results import add_fault, add_row
from tests.support.starting import start_both

pytestmark = pytest.mark.interop

TABLE = "TLS: QEMU -> migrationd -> QEMU"
HEAD = ("QEMU", "transport", "channels", "RAM equal", "completed")
CHANNELS: dict[str, dict[str, bool]] = {
    "main": {},
    "multifd": {"multifd": True},
    "postcopy": {"postcopy-ram": True},
    "preempt": {"postcopy-ram": True, "postcopy-preempt": True},
}


@pytest.mark.parametrize(
    ("version", "transport", "channels"),
    release_cases(
        ("tcp", "unix"),
        tuple(CHANNELS),
        default=lambda *both: both in (("tcp", "main"), ("unix", "multifd")),
    ),
)
async def test_move(
    version: str,
    transport: str,
    channels: str,
    tmp_path: Path,
    closing: list[object],
    request: pytest.FixtureRequest,
) -> None:
    binary = qemu_binary(version)
    directory = make_directory(tmp_path / "pki")
    host = replace(Host(binary), arguments=(*Host(binary).arguments, *objects(directory)))
    capabilities = {"events": True, "return-path": True, **CHANNELS[channels]}
    source, daemon = await start_both(
        closing,
        host.start("QEMU A"),
        DaemonProcess.start(incoming="defer", arguments=objects(directory)),
    )
    await source.wait_serial(3)
    await source.execute("stop")
    digest = await memory_digest(source, host)

    uri = await listen(daemon, transport, tmp_path / "in.sock", capabilities)
    await connect(source, uri, capabilities)
    await daemon.wait_run_state("paused")

    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    uri = await listen(target, transport, tmp_path / "out.sock", capabilities)
    await connect(daemon, uri, capabilities)
    await target.wait_migration("completed")
    assert await memory_digest(target, host) == digest
    row = (version, transport, channels, "yes", "both")
    add_row(request.config, TABLE, row, head=HEAD)


@pytest.mark.parametrize("version", [pytest.param(v, marks=pytest.mark.matrix) for v in RELEASES])
async def test_over_a_passed_socket(version: str, tmp_path: Path, closing: list[object]) -> None:
    """``fd:``, both ways; who is at the other end is told by ``tls-hostname`` alone."""
    binary = qemu_binary(version)
    words = objects(make_directory(tmp_path / "pki"))
    host = replace(Host(binary), arguments=(*Host(binary).arguments, *words))
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer", arguments=words)
    )
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    await source.wait_serial(3)
    await source.execute("stop")
    digest = await memory_digest(source, host)
    for one, other in ((source, daemon), (daemon, target)):
        for peer, end in zip((one, other), socket.socketpair(), strict=True):
            peer.qmp.send_fd_scm(end.fileno())
            await peer.execute("getfd", {"fdname": "passed"})
            end.close()
        await settle(other, {"events": True, "return-path": True}, "server")
        await settle(one, {"events": True, "return-path": True})
        await one.set_parameters({"tls-hostname": "localhost"})
        incoming = asyncio.create_task(other.execute("migrate-incoming", {"uri": "fd:passed"}))
        await one.execute("migrate", {"uri": "fd:passed"})
        await incoming
        await one.wait_migration("completed")
        await other.wait_migration("completed")
    assert await memory_digest(target, host) == digest


@pytest.mark.parametrize("priority", ["NORMAL", "NORMAL:-VERS-TLS1.3"])
@pytest.mark.parametrize("version", [pytest.param(v, marks=pytest.mark.matrix) for v in RELEASES])
async def test_pre_shared_keys(
    version: str, priority: str, tmp_path: Path, closing: list[object]
) -> None:
    if not getattr(ssl, "HAS_PSK", False):
        pytest.skip("TLS with pre-shared keys needs Python 3.13 or later")
    binary = qemu_binary(version)
    (tmp_path / "keys.psk").write_text("qemu:" + "0123456789abcdef" * 4 + "\n")
    both = tuple(
        word
        for end in ("server", "client")
        for word in (
            "-object",
            f"tls-creds-psk,id={end},dir={tmp_path},endpoint={end},priority={priority}",
        )
    )
    host = replace(Host(binary), arguments=(*Host(binary).arguments, *both))
    capabilities = {"events": True, "return-path": True}
    source, daemon = await start_both(
        closing, host.start("QEMU A"), DaemonProcess.start(incoming="defer", arguments=both)
    )
    await source.wait_serial(3)
    await source.execute("stop")
    digest = await memory_digest(source, host)
    uri = await listen(daemon, "tcp", tmp_path / "in.sock", capabilities)
    await connect(source, uri, capabilities)
    await daemon.wait_run_state("paused")
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    uri = await listen(target, "tcp", tmp_path / "out.sock", capabilities)
    await connect(daemon, uri, capabilities)
    await target.wait_migration("completed")
    assert await memory_digest(target, host) == digest


@pytest.mark.parametrize("version", [pytest.param(v, marks=pytest.mark.matrix) for v in RELEASES])
async def test_ciphers_of_the_priority(
    version: str, tmp_path: Path, closing: list[object], qemu_host: Host
) -> None:
    """What only one end allows is not used: no connection without a common cipher."""
    binary = qemu_binary(version)
    directory = make_directory(tmp_path / "pki")
    strong = "NORMAL:-CIPHER-ALL:+AES-256-GCM"
    words = with_priority(objects(directory), strong)
    daemon = await holding(qemu_host, tmp_path, closing, words)
    for priority, status in (
        ("NORMAL:-AES-256-GCM", "failed"),
        ("NORMAL:-CIPHER-ALL:+AES-256-GCM:+AES-256-CBC", "completed"),
    ):
        host = replace(
            Host(binary),
            arguments=(*Host(binary).arguments, *with_priority(objects(directory), priority)),
            machine="pc-i440fx-7.2",
        )
        target = await host.start("QEMU B", incoming="defer", paused=True)
        closing.append(target)
        uri = await listen(target, "tcp", tmp_path / "x", {"events": True})
        await settle(daemon, {"events": True})
        await daemon.execute("migrate", {"uri": uri})
        await daemon.wait_migration(status)


def with_priority(words: tuple[str, ...], priority: str) -> tuple[str, ...]:
    return tuple(f"{word},priority={priority}" if "dir=" in word else word for word in words)


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        ("expired", "certificate 'CN=server,O=migrationd tests' has expired"),
        (
            "name",
            "certificate 'CN=server,O=migrationd tests' is for other.example, not for '127.0.0.1'",
        ),
        pytest.param(
            "self-signed",
            "certificate 'CN=server,O=migrationd tests' is signed by itself; nobody in "
            "ca-cert.pem vouches for it",
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            "authority",
            "certificate 'CN=server,O=migrationd tests' was issued by an authority that is not "
            "in ca-cert.pem",
            marks=pytest.mark.matrix,
        ),
    ],
)
async def test_a_bad_server_is_refused_and_the_guest_kept(
    trouble: str, expected: str, tmp_path: Path, closing: list[object], qemu_host: Host,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    authority = make_authority()
    good = make_pki(tmp_path / "good", authority)
    bad = make_pki(tmp_path / "bad", authority, server=bad_leaf(authority, trouble, "server"))
    daemon = await holding(qemu_host, tmp_path, closing, objects(good))
    bad_host = replace(qemu_host, arguments=(*qemu_host.arguments, *objects(bad, checked=False)))
    target = await bad_host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    uri = await listen(target, "tcp", tmp_path / "x", {"events": True})
    await settle(daemon, {"events": True})
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("failed")
    text = str((await daemon.query_migrate())["error-desc"])
    assert text == f"TLS handshake failed with {uri.removeprefix('tcp:')}: {expected}"
    assert await daemon.run_state() == "paused"

    fine_host = replace(qemu_host, arguments=(*qemu_host.arguments, *objects(good)))
    fine = await fine_host.start("QEMU C", incoming="defer", paused=True)
    closing.append(fine)
    uri = await listen(fine, "tcp", tmp_path / "x", {"events": True})
    await connect(daemon, uri, {"events": True})
    add_fault(request.config, f"TLS, server's {trouble}", text, "held, then moved to the next")


@pytest.mark.parametrize(
    "trouble",
    [
        "self-signed",
        pytest.param("expired", marks=pytest.mark.matrix),
        pytest.param("authority", marks=pytest.mark.matrix),
        pytest.param("none", marks=pytest.mark.matrix),
    ],
)
async def test_a_bad_client_is_refused_and_the_next_one_let_in(
    trouble: str, tmp_path: Path, closing: list[object], qemu_host: Host,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    authority = make_authority()
    good = make_pki(tmp_path / "good", authority)
    bad = write_directory(
        tmp_path / "bad",
        authority,
        client=None if trouble == "none" else bad_leaf(authority, trouble, "client"),
    )
    daemon = await DaemonProcess.start(incoming="defer", arguments=objects(good))
    closing.append(daemon)
    uri = await listen(daemon, "tcp", tmp_path / "x", {"events": True})
    arguments = (*qemu_host.arguments, *client_objects(bad))
    source = await replace(qemu_host, arguments=arguments).start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    await settle(source, {"events": True, "return-path": True})
    await source.execute("migrate", {"uri": uri})
    await source.wait_migration("failed")
    reasons = {
        "expired": "certificate 'CN=client,O=migrationd tests' has expired",
        "self-signed": "certificate 'CN=client,O=migrationd tests' is signed by itself",
        "authority": "certificate 'CN=client,O=migrationd tests' was issued by an authority",
        "none": "the peer has no certificate",
    }
    # The source hears of it before it is written here.
    await until(lambda: reasons[trouble] in daemon.stderr, reasons[trouble])
    assert (await daemon.query_migrate())["status"] == "setup"

    await source.execute("object-del", {"id": "client"})
    properties = {"qom-type": "tls-creds-x509", "id": "client", "dir": str(good)}
    await source.execute("object-add", properties)
    await source.execute("migrate", {"uri": uri})
    await source.wait_migration("completed")
    await daemon.wait_run_state("paused")
    name = f"TLS, client's {trouble}"
    add_fault(request.config, name, reasons[trouble], "guest runs at its source, then comes")


@pytest.mark.parametrize("return_path", [True, False])
async def test_a_destination_that_does_not_let_us_in_is_named_as_such(
    return_path: bool, tmp_path: Path, closing: list[object], qemu_host: Host
) -> None:
    """It says so to its own log alone: what is known here is what it may be."""
    words = objects(make_directory(tmp_path / "pki"))
    daemon = await holding(qemu_host, tmp_path, closing, words)
    rule = ("-object", "authz-simple,id=who,identity=CN=somebody else")
    host = replace(qemu_host, arguments=(*qemu_host.arguments, *words, *rule))
    target = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(target)
    capabilities = {"events": True, "return-path": return_path}
    await target.set_parameters({"tls-authz": "who"})
    uri = await listen(target, "tcp", tmp_path / "x", capabilities)
    await settle(daemon, capabilities)
    await daemon.execute("migrate", {"uri": uri})
    await daemon.wait_migration("failed")
    assert "may have refused our certificate" in str((await daemon.query_migrate())["error-desc"])
    assert await daemon.run_state() == "paused"


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_authorization_asks_for_the_name_that_qemu_asks_for(
    is_allowed: bool, tmp_path: Path, closing: list[object], qemu_host: Host
) -> None:
    directory = make_directory(tmp_path / "pki")
    identity = "O=migrationd tests,,CN=" + ("client" if is_allowed else "other")
    rules = ("-object", f"authz-simple,id=who,identity={identity}")
    source = await replace(qemu_host, arguments=(*qemu_host.arguments, *objects(directory))).start(
        "QEMU A"
    )
    closing.append(source)
    host = replace(qemu_host, arguments=(*qemu_host.arguments, *objects(directory), *rules))
    judge = await host.start("QEMU B", incoming="defer", paused=True)
    closing.append(judge)
    daemon = await DaemonProcess.start(incoming="defer", arguments=(*objects(directory), *rules))
    closing.append(daemon)
    await settle(source, {"events": True, "return-path": True})
    for end in (judge, daemon):
        await end.set_parameters({"tls-authz": "who"})
        uri = await listen(end, "tcp", tmp_path / "x", {"events": True})
        await source.execute("cont")
        await source.execute("migrate", {"uri": uri})
        await source.wait_migration("completed" if is_allowed else "failed")
    if not is_allowed:
        denied = "TLS x509 authz check for O=migrationd tests,CN=client is denied"
        await until(lambda: denied in daemon.stderr, denied)


def objects(directory: Path, *, checked: bool = True) -> tuple[str, ...]:
    """Credentials for both ends."""
    check = "" if checked else ",sanity-check=off"
    return (
        *("-object", f"tls-creds-x509,id=server,dir={directory},endpoint=server{check}"),
        *client_objects(directory),
    )


def client_objects(directory: Path) -> tuple[str, ...]:
    text = f"tls-creds-x509,id=client,dir={directory},endpoint=client,sanity-check=off"
    return ("-object", text)


def make_pki(path: Path, authority: Pair, *, server: Pair | None = None) -> Path:
    return write_directory(
        path,
        authority,
        server=server or make_leaf(authority, "server", is_server=True),
        client=make_leaf(authority, "client", is_server=False),
    )


def bad_leaf(authority: Pair, trouble: str, name: str) -> Pair:
    is_server = name == "server"
    match trouble:
        case "expired":
            return make_leaf(authority, name, is_server=is_server, days=(-9, -1))
        case "name":
            return make_leaf(authority, name, is_server=is_server, names=("other.example",))
        case "self-signed":
            return make_leaf(None, name, is_server=is_server)
        case _:
            return make_leaf(make_authority("Other CA"), name, is_server=is_server)


async def settle(peer: PeerProcess, capabilities: dict[str, bool], end: str = "client") -> None:
    await peer.set_capabilities(capabilities)
    await peer.set_parameters(
        {"tls-creds": end, "tls-hostname": "localhost" if end == "client" else ""}
        if isinstance(peer, QemuProcess) and end == "client"
        else {"tls-creds": end}
    )
    await peer.set_parameters({"max-bandwidth": 0})


async def listen(
    peer: DaemonProcess | QemuProcess, transport: str, path: Path, capabilities: dict[str, bool]
) -> str:
    await settle(peer, capabilities, "server")
    uri = "tcp:127.0.0.1:0" if transport == "tcp" else f"unix:{path}"
    await peer.execute("migrate-incoming", {"uri": uri})
    return await source_uri(peer, uri)


async def connect(peer: PeerProcess, uri: str, capabilities: dict[str, bool]) -> None:
    await settle(peer, capabilities)
    if uri.startswith("unix:"):
        await peer.set_parameters({"tls-hostname": "localhost"})
    if capabilities.get("postcopy-ram"):
        await peer.set_parameters({"max-bandwidth": 1 << 20})
    await peer.execute("migrate", {"uri": uri})
    if capabilities.get("postcopy-ram"):
        await peer.execute("migrate-start-postcopy")
    await peer.wait_migration("completed")


async def holding(
    host: Host, directory: Path, closing: list[object], arguments: tuple[str, ...]
) -> DaemonProcess:
    """A daemon that holds a guest, which came without TLS."""
    uri = f"unix:{directory}/hold.sock"
    daemon = await DaemonProcess.start(incoming=uri, arguments=arguments)
    closing.append(daemon)
    source = await host.start("QEMU A")
    closing.append(source)
    await source.wait_serial(3)
    await park(source, daemon, uri, return_path=True)
    return daemon

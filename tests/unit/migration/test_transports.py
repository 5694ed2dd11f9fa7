"""What a transport can carry."""

import pytest

from migrationd.errors import QMPError
from migrationd.migration.options import MigrationOptions
from migrationd.migration.transports import check_mode, check_transport
from migrationd.transport.address import parse_uri

SINGLE = "Migration requires multi-channel URIs (e.g. tcp)"
SEEKABLE = "Migration requires seekable transport (e.g. file)"


@pytest.mark.parametrize(
    ("uri", "on", "text"),
    [
        ("tcp:h:1", ("multifd",), None),
        ("unix:/s", ("multifd", "postcopy-preempt"), None),
        ("vsock:1:2", ("multifd",), None),
        ("exec:cat", ("multifd",), SINGLE),
        ("fd:name", ("multifd",), SINGLE),
        ("fd:name", ("postcopy-preempt",), SINGLE),
        ("file:/f", ("multifd",), SINGLE),
        ("file:/f", ("multifd", "mapped-ram"), None),
        ("tcp:h:1", ("mapped-ram", "multifd"), SEEKABLE),
        ("exec:cat", (), None),
    ],
)
def test_transports(uri: str, on: tuple[str, ...], text: str | None) -> None:
    options = MigrationOptions()
    capabilities = {name: name in on for name in options.capabilities}
    if text is None:
        check_transport(parse_uri(uri), capabilities, options.parameters)
        return
    with pytest.raises(QMPError) as caught:
        check_transport(parse_uri(uri), capabilities, options.parameters)
    assert caught.value.desc == text


def test_direct_io_is_for_files_and_left_out_elsewhere() -> None:
    options = MigrationOptions()
    options.set_parameters({"direct-io": True})
    options.set_capabilities([("multifd", True)])
    check_transport(parse_uri("tcp:h:1"), options.capabilities, options.parameters)


def test_multifd_comes_before_the_listener() -> None:
    options = MigrationOptions()
    options.is_listening = True
    with pytest.raises(QMPError, match=r"^Multifd must be set before incoming starts$"):
        options.set_capabilities([("multifd", True)])
    options.is_listening = False
    options.set_capabilities([("multifd", True)])
    options.is_listening = True
    options.set_capabilities([("multifd", True), ("events", True)])
    options.set_capabilities([("multifd", False)])


@pytest.mark.parametrize(
    ("mode", "on", "text"),
    [
        ("normal", ("postcopy-ram",), None),
        ("cpr-transfer", (), None),
        ("cpr-reboot", ("multifd", "auto-converge"), None),
        ("cpr-transfer", ("postcopy-ram",), "Cannot use postcopy with CPR"),
        ("cpr-reboot", ("dirty-bitmaps",), "Cannot use postcopy with CPR"),
        ("cpr-reboot", ("background-snapshot",), "Cannot use background snapshot with CPR"),
        ("cpr-exec", ("x-colo",), "Cannot use COLO with CPR"),
        ("cpr-exec", (), "cpr-exec mode requires setting cpr-exec-command"),
    ],
)
def test_modes(mode: str, on: tuple[str, ...], text: str | None) -> None:
    options = MigrationOptions()
    options.set_parameters({"mode": mode})
    capabilities = {name: name in on for name in options.capabilities}
    if text is None:
        check_mode(capabilities, options.parameters)
        return
    with pytest.raises(QMPError) as caught:
        check_mode(capabilities, options.parameters)
    assert caught.value.desc == text


def test_cpr_exec_is_for_who_executes_the_guest() -> None:
    options = MigrationOptions()
    options.set_parameters({"mode": "cpr-exec", "cpr-exec-command": ["/bin/true"]})
    with pytest.raises(QMPError, match="migrationd is none; use cpr-transfer"):
        check_mode(options.capabilities, options.parameters)


def test_cpr_transfer_is_no_file() -> None:
    options = MigrationOptions()
    options.set_parameters({"mode": "cpr-transfer"})
    with pytest.raises(QMPError, match=r"^Migration requires streamable transport \(eg unix\)$"):
        check_transport(parse_uri("file:/f"), options.capabilities, options.parameters)

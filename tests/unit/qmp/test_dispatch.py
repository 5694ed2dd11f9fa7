"""Requests to replies, over a control without a guest."""

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from pydantic import TypeAdapter

from migrationd.migration.info import MigrationInfo, RamStats
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.transport.address import ExecAddress, FileAddress, InetAddress, UnixAddress
from tests.support.fake_control import FakeControl, FakeIncoming
from tests.support.monitor import Monitor


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(incoming=FakeIncoming(refusal=None))


@pytest.fixture
async def monitor(control: FakeControl) -> Monitor:
    monitor = Monitor(control)
    await monitor.feed(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    return monitor


async def ask(monitor: Monitor, name: str, arguments: object = None) -> dict[str, Any]:
    request = {"execute": name} if arguments is None else {"execute": name, "arguments": arguments}
    (reply,) = await monitor.feed(json.dumps(request).encode())
    if "return" in reply:
        TypeAdapter(COMMANDS[name].returns).validate_python(reply["return"])
    return reply


async def test_what_is_asked_of_the_guest(monitor: Monitor, control: FakeControl) -> None:
    control.guest_name = "guest1"
    control.guest_uuid = UUID(int=7)
    assert (await ask(monitor, "query-name"))["return"] == {"name": "guest1"}
    assert (await ask(monitor, "query-uuid"))["return"] == {
        "UUID": "00000000-0000-0000-0000-000000000007"
    }
    assert (await ask(monitor, "query-status"))["return"] == {
        "status": "prelaunch",
        "running": False,
    }
    names = {item["name"] for item in (await ask(monitor, "query-commands"))["return"]}
    assert names == set(COMMANDS)
    for name in ("stop", "cont", "quit", "migrate_cancel"):
        assert await ask(monitor, name) == {"return": {}}
    assert control.calls == [("cont",), ("quit",), ("migrate_cancel",)]


async def test_no_name_and_no_uuid(monitor: Monitor) -> None:
    assert (await ask(monitor, "query-name"))["return"] == {}
    assert (await ask(monitor, "query-uuid"))["return"]["UUID"].strip("0-") == ""


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ({"uri": "tcp:host:1"}, InetAddress("host", "1")),
        ({"uri": "tcp:host:1", "channels": [], "detach": True}, InetAddress("host", "1")),
        ({"uri": "unix:/x"}, UnixAddress("/x")),
        ({"uri": "exec:cat"}, ExecAddress(("/bin/sh", "-c", "cat"))),
        (
            {
                "channels": [
                    {
                        "channel-type": "main",
                        "addr": {"transport": "file", "filename": "/f", "offset": 512},
                    }
                ]
            },
            FileAddress("/f", 512),
        ),
    ],
)
async def test_migrate(
    monitor: Monitor, control: FakeControl, arguments: dict[str, object], address: object
) -> None:
    assert await ask(monitor, "migrate", arguments) == {"return": {}}
    assert await ask(monitor, "migrate-incoming", drop(arguments, "detach")) == {"return": {}}
    assert control.calls == [("migrate", (address,)), ("migrate_incoming", (address,), True)]


def drop(arguments: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in arguments.items() if key != name}


def channel(kind: str) -> dict[str, object]:
    addr = {"transport": "socket", "type": "unix", "path": "/x"}
    return {"channel-type": kind, "addr": addr}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "need either 'uri' or 'channels' argument"),
        ({"channels": []}, "need either 'uri' or 'channels' argument"),
        (
            {"uri": "tcp:h:1", "channels": [channel("main")]},
            "need either 'uri' or 'channels' argument",
        ),
        ({"uri": ""}, "unknown migration protocol: "),
        (
            {"channels": [channel("main"), channel("main")]},
            "Channel list has more than one main entry",
        ),
        ({"channels": [channel("cpr")]}, "Channel list has no main entry"),
        ({"uri": "tcp:h:1", "resume": True}, "Cannot resume if there is no paused migration"),
    ],
)
async def test_refused_migrations(monitor: Monitor, arguments: object, text: str) -> None:
    reply = await ask(monitor, "migrate", arguments)
    assert reply == {"error": {"class": "GenericError", "desc": text}}


async def test_incoming_asks_for_its_state_before_its_address(
    monitor: Monitor, control: FakeControl
) -> None:
    control.incoming.refusal = "no"
    reply = await ask(monitor, "migrate-incoming", {"uri": "bogus"})
    assert reply["error"]["desc"] == "no"


async def test_both_parts_of_query_migrate(monitor: Monitor, control: FakeControl) -> None:
    assert (await ask(monitor, "query-migrate"))["return"] == {}
    address: dict[str, object] = {"type": "inet", "host": "::1", "port": "4", "ipv6": True}
    control.incoming.migration = MigrationInfo(status="setup", socket_address=(address,))
    assert (await ask(monitor, "query-migrate"))["return"] == {
        "status": "setup",
        "socket-address": [address],
    }
    control.outgoing.migration = MigrationInfo(
        status="active",
        total_time_ms=12,
        setup_time_ms=1,
        expected_downtime_ms=300,
        remaining_bytes=4096,
        ram=RamStats(transferred=1, mbps=2.5),
    )
    reply = (await ask(monitor, "query-migrate"))["return"]
    assert reply["status"] == "active"
    assert reply["total-time"] == 12
    assert reply["ram"]["mbps"] == 2.5
    assert len(reply["ram"]) == 17
    assert "xbzrle-cache" not in reply
    control.options.set_capabilities([("xbzrle", True)])
    cache = (await ask(monitor, "query-migrate"))["return"]["xbzrle-cache"]
    assert cache["cache-size"] == control.options.parameters["xbzrle-cache-size"]
    assert len(cache) == 7
    control.outgoing.migration = replace(control.outgoing.migration, error_desc="x", ram=None)
    reply = (await ask(monitor, "query-migrate"))["return"]
    assert reply["error-desc"] == "x"


async def test_parameters_come_back(monitor: Monitor, control: FakeControl) -> None:
    mapping = [
        {
            "node-name": "n",
            "alias": "a",
            "bitmaps": [
                {"name": "b", "alias": "c"},
                {"name": "d", "alias": "e", "transform": {}},
                {"name": "f", "alias": "g", "transform": {"persistent": True}},
            ],
        }
    ]
    before = (await ask(monitor, "query-migrate-parameters"))["return"]
    assert len(before) == 30
    changes = {"block-bitmap-mapping": mapping, "tls-hostname": None, "downtime-limit": 5}
    assert await ask(monitor, "migrate-set-parameters", changes) == {"return": {}}
    after = (await ask(monitor, "query-migrate-parameters"))["return"]
    assert after == before | {"block-bitmap-mapping": mapping, "downtime-limit": 5}
    assert control.calls == [("parameters_changed",)]


async def test_out_of_band_is_for_commands_that_allow_it(monitor: Monitor) -> None:
    replies = await monitor.feed(
        b'{"exec-oob": "query-status", "id": 1}{"exec-oob": "x", "id": 2}'
        b'{"exec-oob": "stop", "execute": "stop", "id": 3}'
    )
    assert [reply["error"]["desc"] for reply in replies] == [  # type: ignore[index]
        "The command query-status does not support OOB",
        "The command x has not been found",
        "QMP input member 'execute' clashes with 'exec-oob'",
    ]


async def test_a_defect_of_ours_does_not_end_the_monitor(
    monitor: Monitor, control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "cont", lambda: 1 / 0)
    reply = await ask(monitor, "cont")
    assert reply["error"]["desc"].startswith("internal error")
    assert await ask(monitor, "stop") == {"return": {}}

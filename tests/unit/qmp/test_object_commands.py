"""object-add, object-del and the object tree; texts are those of QEMU 11.1."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from migrationd.objects.registry import OBJECT_TYPES
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.objects import OBJECT_MEMBERS
from tests.support.fake_control import FakeChardev, FakeControl
from tests.support.monitor import Monitor

CONTAINER = {"name": "type", "type": "string"}


@pytest.fixture
def control() -> FakeControl:
    control = FakeControl()
    control.machine.devices["compat_monitor0"] = FakeChardev()
    control.machine.type_name = "pc-i440fx-11.1"
    return control


@pytest.fixture
async def monitor(control: FakeControl) -> Monitor:
    monitor = Monitor(control)
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    return monitor


async def ask(monitor: Monitor, command: str, /, **arguments: object) -> Any:  # noqa: ANN401  # any JSON value
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    (reply,) = await monitor.feed(json.dumps({"execute": command, "arguments": given}).encode())
    if "error" in reply:
        error = reply["error"]
        assert isinstance(error, dict)
        return f"{error['class']}: {error['desc']}"
    TypeAdapter(COMMANDS[command].returns).validate_python(reply["return"])
    return reply["return"]


def test_models_and_objects_are_of_the_same_types() -> None:
    assert set(OBJECT_MEMBERS) == set(OBJECT_TYPES)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'qom-type' is missing"),
        ({"id": "n"}, "Parameter 'qom-type' is missing"),
        ({"qom_type": "nosuch", "id": "n"}, "Parameter 'qom-type' does not accept value 'nosuch'"),
        ({"qom_type": 1}, "Invalid parameter type for 'qom-type', expected: string"),
        ({"qom_type": "secret"}, "Parameter 'id' is missing"),
        (
            {"qom_type": "secret", "id": "z", "data": 1},
            "Invalid parameter type for 'data', expected: string",
        ),
        ({"qom_type": "tls-creds-psk", "id": "q", "foo": 1}, "Parameter 'foo' is unexpected"),
        (
            {"qom_type": "authz-list", "id": "z", "rules": [{"match": "a"}]},
            "Parameter 'rules[0].policy' is missing",
        ),
        ({"qom_type": "authz-simple", "id": "z"}, "Parameter 'identity' is missing"),
        (
            {"qom_type": "tls-creds-x509", "id": "z", "endpoint": "x"},
            "Parameter 'endpoint' does not accept value 'x'",
        ),
        (
            {"qom_type": "authz-simple", "id": "bad id", "identity": "x"},
            "Parameter 'id' expects an identifier",
        ),
        ({"qom_type": "secret", "id": "s"}, "Either 'file' or 'data' must be provided"),
        (
            {"qom_type": "tls-creds-x509", "id": "x", "endpoint": "client", "dir": "/nonexistent"},
            "Unable to access credentials /nonexistent/ca-cert.pem: No such file or directory",
        ),
    ],
)
async def test_objects_that_cannot_be(
    monitor: Monitor, arguments: dict[str, object], text: str
) -> None:
    assert await ask(monitor, "object-add", **arguments) == f"GenericError: {text}"
    assert await ask(monitor, "qom-list", path="/objects") == [
        CONTAINER,
        {"name": "compat_monitor0", "type": "child<monitor-qmp>"},
    ]


async def test_an_object_comes_is_seen_and_goes(monitor: Monitor) -> None:
    rules = [{"match": "a", "policy": "allow"}]
    added = await ask(
        monitor, "object-add", qom_type="authz-list", id="a1", policy="allow", rules=rules
    )
    assert added == {}
    again = await ask(monitor, "object-add", qom_type="authz-list", id="a1")
    assert again == (
        "GenericError: attempt to add duplicate property 'a1' to object (type 'container')"
    )
    listed = await ask(monitor, "qom-list", path="/objects")
    assert {"name": "a1", "type": "child<authz-list>"} in listed
    for path in ("/objects/a1", "a1", "objects/a1"):
        assert await ask(monitor, "qom-list-get", paths=[path]) == [
            {
                "properties": [
                    {"name": "type", "type": "string", "value": "authz-list"},
                    {"name": "policy", "type": "QAuthZListPolicy", "value": "allow"},
                    {"name": "rules", "type": "QAuthZListRule", "value": rules},
                ]
            }
        ]
    assert await ask(monitor, "qom-get", path="/objects", property="a1") == "/objects/a1"
    assert await ask(monitor, "qom-get", path="a1", property="rules") == rules
    assert await ask(monitor, "qom-get", path="a1", property="no") == (
        "GenericError: Property 'authz-list.no' not found"
    )
    assert await ask(monitor, "object-del", id="a1") == {}
    assert await ask(monitor, "object-del", id="a1") == "GenericError: object 'a1' not found"
    assert await ask(monitor, "qom-list", path="/objects/a1") == (
        "DeviceNotFound: Device '/objects/a1' not found"
    )


async def test_what_was_not_given_shows_its_default(monitor: Monitor, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("qemu:00112233445566778899aabbccddeeff\n")
    added = await ask(
        monitor, "object-add",
        qom_type="tls-creds-psk", id="p", endpoint="server", dir=str(tmp_path),
    )  # fmt: skip
    if added != {}:
        pytest.skip(f"no TLS with pre-shared keys here: {added}")
    (found,) = await ask(monitor, "qom-list-get", paths=["/objects/p"])
    assert {item["name"]: item["value"] for item in found["properties"]} == {
        "type": "tls-creds-psk",
        "endpoint": "server",
        "dir": str(tmp_path),
        "verify-peer": True,
        "priority": "",
        "username": "",
    }


async def test_the_tree(monitor: Monitor) -> None:
    children = [CONTAINER] + [
        {"name": name, "type": f"child<{kind}>"}
        for name, kind in (
            ("machine", "pc-i440fx-11.1-machine"),
            ("objects", "container"),
            ("chardevs", "container"),
        )
    ]
    assert await ask(monitor, "qom-list", path="/") == children
    for path in ("/machine/unattached", "/machine/peripheral", "/machine/peripheral-anon"):
        assert await ask(monitor, "qom-list", path=path) == [CONTAINER]
    machine = "pc-i440fx-11.1-machine"
    assert await ask(monitor, "qom-get", path="/machine", property="type") == machine
    assert await ask(monitor, "qom-get", path="/chardevs/compat_monitor0", property="connected")
    assert await ask(monitor, "qom-get", path="/objects/compat_monitor0", property="chardev") == (
        "compat_monitor0"
    )


@pytest.mark.parametrize(
    ("command", "arguments", "error"),
    [
        ("qom-list", {"path": "/nowhere"}, "DeviceNotFound: Device '/nowhere' not found"),
        ("qom-list", {"path": ""}, "GenericError: Path '' is ambiguous"),
        (
            "qom-list",
            {"path": "compat_monitor0"},
            "GenericError: Path 'compat_monitor0' is ambiguous",
        ),
        (
            "qom-get",
            {"path": "/machine", "property": "nope"},
            "GenericError: Property 'pc-i440fx-11.1-machine.nope' not found",
        ),
        (
            "qom-set",
            {"path": "/machine", "property": "type", "value": "x"},
            "GenericError: Property 'pc-i440fx-11.1-machine.type' is not writable",
        ),
        (
            "qom-set",
            {"path": "/machine", "property": "nope", "value": None},
            "GenericError: Property 'pc-i440fx-11.1-machine.nope' not found",
        ),
        (
            "qom-set",
            {"path": "/nowhere", "property": "a", "value": 1},
            "DeviceNotFound: Device '/nowhere' not found",
        ),
        ("qom-set", {"path": "/", "property": "a"}, "GenericError: Parameter 'value' is missing"),
        (
            "qom-list-get",
            {"paths": ["/objects", "/nope"]},
            "DeviceNotFound: Device '/nope' not found",
        ),
        ("qom-list-properties", {"typename": "no"}, "DeviceNotFound: Class 'no' not found"),
        ("device-list-properties", {"typename": "no"}, "DeviceNotFound: Device 'no' not found"),
        (
            "device-list-properties",
            {"typename": "secret"},
            "GenericError: Parameter 'typename' expects a non-abstract device type",
        ),
    ],
)
async def test_refusals(
    monitor: Monitor, command: str, arguments: dict[str, object], error: str
) -> None:
    assert await ask(monitor, command, **arguments) == error


async def test_types(monitor: Monitor) -> None:
    names = {item["name"] for item in await ask(monitor, "qom-list-types")}
    assert set(OBJECT_TYPES) <= names
    assert "tls-creds" not in names
    with_abstract = await ask(monitor, "qom-list-types", abstract=True)
    assert {"name": "tls-creds", "abstract": True, "parent": "object"} in with_abstract
    made = await ask(monitor, "qom-list-types", implements="user-creatable")
    assert {item["name"] for item in made} == set(OBJECT_TYPES)
    creds = await ask(monitor, "qom-list-types", implements="tls-creds")
    assert creds == [
        {"name": name, "parent": "tls-creds"}
        for name in ("tls-creds-anon", "tls-creds-psk", "tls-creds-x509")
    ]
    assert await ask(monitor, "qom-list-types", implements="device") == []


async def test_properties_of_a_type(monitor: Monitor) -> None:
    found = await ask(monitor, "qom-list-properties", typename="tls-creds-x509")
    assert {item["name"]: item["type"] for item in found} == {
        "type": "string",
        "endpoint": "QCryptoTLSCredsEndpoint",
        "dir": "string",
        "verify-peer": "bool",
        "priority": "string",
        "sanity-check": "bool",
        "passwordid": "string",
    }
    secret = await ask(monitor, "qom-list-properties", typename="secret")
    assert {"name": "format", "type": "QCryptoSecretFormat"} in secret

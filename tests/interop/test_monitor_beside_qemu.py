"""What the monitor says of itself and of wrong arguments, beside a real QEMU 11.1."""

import json
import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrationd.ctl.qemu_process import QemuProcess
from migrationd.qmp.handlers import legacy
from migrationd.qmp.handlers.introspection import entities
from migrationd.qmp.handlers.table import COMMANDS
from tests.support.fake_control import FakeControl
from tests.support.introspection import differences, named
from tests.support.monitor import Monitor
from tests.support.releases import qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

VERSION = "11.1"
ROUNDS_PER_COMMAND = 40

Json = dict[str, Any]
OURS: list[Json] = entities(COMMANDS.values())

NOT_HERE = {
    "object-add": "types of objects that are not built",
    "query-block": "no block devices",
    "query-block-jobs": "no block devices",
    "query-blockstats": "no block devices",
    "query-named-block-nodes": "no block devices",
    "query-cpus-fast": "no vCPUs",
    "query-dump-guest-memory-capability": "no dumps of memory",
    "query-memory-devices": "no memory devices",
    "query-rx-filter": "no network cards",
    "query-spice": "no display",
    "query-tpm": "no TPM",
    "query-vnc": "no display",
}
"""Commands that describe less than QEMU's, and what it is that they do not describe."""

OLD_MEMBERS = ["migrate: +detach deprecated"]

ANY_ARGUMENTS = ("device_add",)
"""Commands that take every argument."""


class Qemu:
    """A blocking client of a real QEMU."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")
        self._stream.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, arguments: Json | None = None) -> Json:
        """One command and its reply; events are left out."""
        request = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            reply: Json = json.loads(self._stream.readline())
            if "event" not in reply:
                return reply

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()


@pytest.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[Qemu]:
    path = tmp_path / "second.qmp"
    arguments = ("-qmp", f"unix:{path},server=on,wait=off")
    async with await QemuProcess.start(qemu_binary(VERSION), paused=True, arguments=arguments):
        client = Qemu(path)
        yield client
        client.close()


async def test_every_entity_beside_the_running_one(
    qemu: Qemu, request: pytest.FixtureRequest
) -> None:
    theirs = qemu.ask("query-qmp-schema")["return"]
    both = [name for name in named(OURS) if name in named(theirs)]
    assert set(named(OURS)) - set(both) == {spec.name for spec in legacy.COMMANDS}
    differing = {}
    for name in both:
        if found := list(differences(OURS, theirs, name)):
            differing[name] = found
    assert differing.pop("migrate") == OLD_MEMBERS
    assert set(differing) == set(NOT_HERE)
    for name, found in differing.items():
        # Less is described, but nothing is described otherwise.
        assert [line for line in found if ": +" in line] == [], name
    table = "commands and events beside a running QEMU 11.1"
    add_row(request.config, table, ("equal", str(len(both) - len(differing) - 1)))
    add_row(request.config, table, ("describe less", ", ".join(sorted(differing))))
    add_row(request.config, table, ("describe more", ", ".join(OLD_MEMBERS)))


def wrong_arguments(schema: dict[str, Json], arg_type: str, rng: random.Random) -> Iterator[Json]:
    """Arguments of which at least one is wrong, so that no command is performed."""
    members = schema[arg_type]["members"]
    for _ in range(ROUNDS_PER_COMMAND):
        arguments: Json = {}
        for member in members:
            if rng.random() < 0.75:
                arguments[member["name"]] = some_value(schema, member["type"], rng)
        items = list(arguments.items())
        rng.shuffle(items)
        yield {**dict(items), "zz": 1}


def some_value(schema: dict[str, Json], type_name: str, rng: random.Random) -> object:
    entity = schema[type_name]
    if rng.random() < 0.35:
        return rng.choice(
            (None, True, 7, -7, 1 << 40, 1 << 64, 1.5, "x", "", [], {}, [1], {"x": 1})
        )
    kind = entity["meta-type"]
    if kind == "enum":
        return rng.choice(entity["values"])
    if kind == "array":
        return [
            some_value(schema, entity["element-type"], rng) for _ in range(rng.choice((0, 1, 2)))
        ]
    if kind == "alternate":
        return some_value(schema, rng.choice(entity["members"])["type"], rng)
    if kind == "object":
        value = {
            member["name"]: some_value(schema, member["type"], rng)
            for member in entity["members"]
            if rng.random() < 0.8
        }
        for variant in entity.get("variants", ()):
            if variant["case"] == value.get(entity["tag"]):
                more = some_value(schema, variant["type"], rng)
                value |= more if isinstance(more, dict) else {}
        return value
    values: dict[str, object] = {"string": "text", "int": 3, "number": 0.5, "boolean": False}
    return values.get(entity["json-type"])


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.matrix)])
async def test_wrong_arguments_draw_the_same_words(
    qemu: Qemu, seed: int, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(seed)
    schema = {item["name"]: item for item in qemu.ask("query-qmp-schema")["return"]}
    monitor = Monitor(FakeControl())
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    compared = 0
    for entity in OURS:
        name = entity["name"]
        if entity["meta-type"] != "command" or name in (*NOT_HERE, *ANY_ARGUMENTS):
            continue
        if name not in schema or name == "qmp_capabilities":
            continue
        for arguments in wrong_arguments(schema, schema[name]["arg-type"], rng):
            theirs = qemu.ask(name, arguments)
            sent = json.dumps({"execute": name, "arguments": arguments})
            (ours,) = await monitor.feed(sent.encode())
            assert ours == theirs, sent
            compared += 1
    add_row(
        request.config,
        "wrong arguments beside a running QEMU 11.1",
        (f"seed {seed}", f"{compared} refusals with the same words"),
    )

"""Commands about the machine, yank, dirty rate, replication and those of old releases.

Texts are those that QEMU 11.1 was recorded with.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from migrationd.qmp.context import MemoryPart
from migrationd.qmp.handlers.machine import COMMANDS as MACHINE_COMMANDS
from migrationd.qmp.handlers.machine import nothing_of_the_kind
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.events import EVENTS
from tests.support.fake_control import FakeChardev, FakeControl
from tests.support.monitor import Monitor


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
async def monitor(control: FakeControl) -> Monitor:
    monitor = Monitor(control)
    await monitor.feed(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    return monitor


async def ask(
    monitor: Monitor, command: str, /, *, how: str = "execute", **arguments: object
) -> Any:  # noqa: ANN401  # any JSON value
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    (reply,) = await monitor.feed(json.dumps({how: command, "arguments": given}).encode())
    if "error" in reply:
        return reply["error"]
    TypeAdapter(COMMANDS[command].returns).validate_python(reply["return"])
    return reply["return"]


def refused(text: str, class_: str = "GenericError") -> dict[str, str]:
    return {"class": class_, "desc": text}


@pytest.mark.parametrize(
    "name", [spec.name for spec in MACHINE_COMMANDS if spec.handler is nothing_of_the_kind]
)
async def test_what_the_machine_does_not_have(monitor: Monitor, name: str) -> None:
    assert await ask(monitor, name) == []


@pytest.mark.parametrize(
    ("machine", "arch"),
    [("pc-i440fx-11.1", "x86_64"), ("microvm", "x86_64"), ("virt-10.0", "aarch64")],
)
async def test_target(monitor: Monitor, control: FakeControl, machine: str, arch: str) -> None:
    control.machine.type_name = machine
    assert await ask(monitor, "query-target") == {"arch": arch}


async def test_main_memory(monitor: Monitor, control: FakeControl) -> None:
    control.machine.memory = [MemoryPart("heap", 65536, is_shared=True)]
    (found,) = await ask(monitor, "query-memdev")
    assert (found["id"], found["size"], found["share"]) == ("heap", 65536, True)


async def test_iothreads(monitor: Monitor) -> None:
    assert await ask(monitor, "query-iothreads") == []
    assert await ask(monitor, "object-add", qom_type="iothread", id="io0", poll_grow=4) == {}
    (found,) = await ask(monitor, "query-iothreads")
    assert Path(f"/proc/self/task/{found.pop('thread-id')}/comm").exists()
    assert found == {
        "id": "io0",
        "poll-max-ns": 32768,
        "poll-grow": 4,
        "poll-shrink": 2,
        "poll-weight": 3,
        "aio-max-batch": 0,
    }
    for given, text in (
        ({"poll_max_ns": -5}, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ({"poll_weight": 64}, "poll-weight value must be in range [0, 63]"),
        (
            {"thread_pool_max": 1, "thread_pool_min": 5},
            "bad thread-pool-min/thread-pool-max values",
        ),
        ({"thread_pool_max": 1 << 40}, "bad thread-pool-min/thread-pool-max values"),
    ):
        answer = await ask(monitor, "object-add", qom_type="iothread", id="io1", **given)
        assert answer == refused(text)
    assert await ask(monitor, "object-del", id="io0") == {}
    assert await ask(monitor, "query-iothreads") == []


async def test_without_encrypted_memory(monitor: Monitor) -> None:
    found = await ask(monitor, "query-sev")
    assert (found["enabled"], found["state"], found["sev-type"]) == (False, "uninit", "sev")
    assert await ask(monitor, "query-dump-guest-memory-capability") == {"formats": []}


async def test_devices_that_cannot_migrate_are_told(monitor: Monitor, control: FakeControl) -> None:
    control.machine.blockers = ("camera",)
    assert await ask(monitor, "query-migrate") == {
        "blocked-reasons": ["non-migratable device: camera"]
    }


async def test_files_of_devices(monitor: Monitor, control: FakeControl) -> None:
    assert await ask(monitor, "xen-save-devices-state", filename="/f", live=False) == {}
    assert await ask(monitor, "xen-load-devices-state", filename="/f") == {}
    assert control.machine.calls == ["save_devices /f", "load_devices /f"]


async def test_what_is_known_of_the_machine(monitor: Monitor, control: FakeControl) -> None:
    control.machine.base_memory_bytes = 16777216
    assert await ask(monitor, "query-memory-size-summary") == {
        "base-memory": 16777216,
        "plugged-memory": 0,
    }
    assert await ask(monitor, "query-current-machine") == {"wakeup-suspend-support": False}
    assert await ask(monitor, "query-vnc") == {"enabled": False}
    assert await ask(monitor, "query-spice") == {
        "enabled": False,
        "migrated": False,
        "mouse-mode": "client",
    }
    assert await ask(monitor, "query-replay") == {"mode": "none", "icount": 0}
    assert await ask(monitor, "query-dump") == {"status": "none", "completed": 0, "total": 0}


NO_BALLOON = refused("No balloon device has been activated", "DeviceNotActive")


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("query-balloon", {}, NO_BALLOON),
        ("balloon", {"value": 1048576}, NO_BALLOON),
        ("announce-self", {"initial": 50}, refused("Parameter 'max' is missing")),
        (
            "client_migrate_info",
            {"protocol": "spice", "hostname": "h", "port": 1},
            refused("SPICE is not in use", "DeviceNotActive"),
        ),
        (
            "client_migrate_info",
            {"protocol": "vnc", "hostname": "h"},
            refused("Parameter 'protocol' expects 'spice'"),
        ),
        ("inject-nmi", {}, refused("machine does not provide NMIs")),
        ("device_del", {"id": "no"}, refused("Device 'no' not found", "DeviceNotFound")),
        (
            "device_add",
            {"driver": "no", "addr": "3"},
            refused("'no' is not a valid device model name"),
        ),
        ("set_link", {"name": "n", "up": False}, refused("Device 'n' not found", "DeviceNotFound")),
        ("query-rx-filter", {"name": "x"}, refused("invalid net client name: x")),
        (
            "x-exit-preconfig",
            {},
            refused("The command is permitted only before machine initialization"),
        ),
        ("system_wakeup", {}, refused("wake-up from suspend is not supported by this guest")),
        (
            "set-vcpu-dirty-limit",
            {"dirty_rate": 10},
            refused(
                "dirty page limit feature requires KVM with accelerator property "
                "'dirty-ring-size' set'"
            ),
        ),
        ("x-colo-lost-heartbeat", {}, refused("VM is not in COLO mode")),
        (
            "query-hotpluggable-cpus",
            {},
            refused("machine does not support hot-plugging CPUs"),
        ),
        (
            "query-acpi-ospm-status",
            {},
            refused("command is not supported, missing ACPI device"),
        ),
        (
            "query-gic-capabilities",
            {},
            refused("GIC hardware is not available on this target"),
        ),
        (
            "query-cpu-model-expansion",
            {"type": "static", "model": {"name": "qemu64"}},
            refused("CPU model 'qemu64' not found"),
        ),
        (
            "xen-set-replication",
            {"enable": True, "primary": True, "failover": True},
            refused("Parameter 'failover' is only for stopping replication"),
        ),
        (
            "set-action",
            {"shutdown": "x"},
            refused("Parameter 'shutdown' does not accept value 'x'"),
        ),
    ],
)
async def test_refusals(
    monitor: Monitor, name: str, arguments: dict[str, object], error: dict[str, str]
) -> None:
    assert await ask(monitor, name, **arguments) == error


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("announce-self", {"initial": 50, "max": 550, "rounds": 1, "step": 10, "id": "a"}),
        ("set-action", {"shutdown": "pause"}),
        ("rtc-reset-reinjection", {}),
        ("watchdog-set-action", {"action": "pause"}),
        ("cancel-vcpu-dirty-limit", {}),
        ("xen-set-global-dirty-log", {"enable": True}),
        ("xen-set-replication", {"enable": True, "primary": False}),
        ("xen-colo-do-checkpoint", {}),
    ],
)
async def test_accepted(monitor: Monitor, name: str, arguments: dict[str, object]) -> None:
    assert await ask(monitor, name, **arguments) == {}


async def test_no_device_while_a_migration_runs(monitor: Monitor, control: FakeControl) -> None:
    control.machine.is_migrating = True
    assert await ask(monitor, "device_add", driver="virtio-rng-pci") == refused(
        "device_add not allowed while migrating"
    )


async def test_power_and_reset_reach_the_machine(monitor: Monitor, control: FakeControl) -> None:
    for name in ("system_reset", "system_powerdown"):
        assert await ask(monitor, name) == {}
    assert control.machine.calls == ["reset", "powerdown"]


async def test_replication_at_rest(monitor: Monitor) -> None:
    assert await ask(monitor, "query-colo-status") == {
        "mode": "none",
        "last-mode": "none",
        "reason": "none",
    }
    assert await ask(monitor, "query-xen-replication-status") == {"error": False}
    assert await ask(monitor, "query-vcpu-dirty-limit") == []


async def test_monitors_are_chardevs(monitor: Monitor, control: FakeControl) -> None:
    control.machine.devices = {
        "compat_monitor0": FakeChardev(),
        "compat_monitor1": FakeChardev("unix:/b,server=on", is_connected=False),
    }
    found = await ask(monitor, "query-chardev")
    assert [(item["label"], item["filename"]) for item in found] == [
        ("compat_monitor0", "unix:/run/fake.sock,server=on"),
        ("compat_monitor1", "disconnected:unix:/b,server=on"),
    ]


async def test_yank(monitor: Monitor, control: FakeControl) -> None:
    device = FakeChardev()
    control.machine.devices = {
        "compat_monitor0": device,
        "stdio": FakeChardev("stdio", is_socket=False),
    }
    monitor_instance = {"type": "chardev", "id": "compat_monitor0"}
    migration = {"type": "migration"}
    not_found = refused("Instance not found", "DeviceNotFound")
    assert await ask(monitor, "query-yank", how="exec-oob") == [monitor_instance]
    assert await ask(monitor, "yank", instances=[]) == {}
    for instances in (
        [migration],
        [monitor_instance, migration],
        [{"type": "chardev", "id": "stdio"}],
        [{"type": "block-node", "node-name": "d"}],
    ):
        assert await ask(monitor, "yank", instances=instances) == not_found
    assert device.is_connected
    assert control.machine.calls == []
    assert await ask(monitor, "yank", instances=[{"type": "bogus"}]) == refused(
        "Parameter 'type' does not accept value 'bogus'"
    )
    control.machine.is_migration_yankable = True
    assert await ask(monitor, "query-yank") == [monitor_instance, migration]
    assert await ask(monitor, "yank", how="exec-oob", instances=[monitor_instance, migration]) == {}
    assert control.machine.calls == ["yank_migration"]
    assert not device.is_connected


async def test_dirty_rate(monitor: Monitor) -> None:
    at_rest = {
        "status": "unstarted",
        "sample-pages": 0,
        "mode": "page-sampling",
        "calc-time-unit": "second",
        "start-time": 0,
        "calc-time": 0,
    }
    assert await ask(monitor, "query-dirty-rate") == at_rest
    for arguments, text in (
        ({"calc_time": 0}, "Calculation time is out of range [50ms, 60000ms]."),
        ({"calc_time": 61}, "Calculation time is out of range [50ms, 60000ms]."),
        ({"calc_time": 1, "sample_pages": 1}, "sample-pages is out of range[128, 16384]."),
        (
            {"calc_time": 1, "mode": "dirty-ring"},
            "mode dirty-ring is not enabled, use other method instead.",
        ),
        (
            {"calc_time": 1, "mode": "dirty-bitmap", "sample_pages": 512},
            "sample-pages is used only in page-sampling mode",
        ),
        ({"calc_time": 1, "mode": "bogus"}, "Parameter 'mode' does not accept value 'bogus'"),
    ):
        assert await ask(monitor, "calc-dirty-rate", **arguments) == refused(text)
    assert await ask(monitor, "calc-dirty-rate", calc_time=1500, calc_time_unit="millisecond") == {}
    assert await ask(monitor, "calc-dirty-rate", calc_time=0) == refused(
        "the dirty rate is already being measured."
    )
    measuring = {**at_rest, "status": "measuring", "sample-pages": 512, "start-time": 1000}
    assert await ask(monitor, "query-dirty-rate") == {**measuring, "calc-time": 1}
    assert await ask(monitor, "query-dirty-rate", calc_time_unit="millisecond") == {
        **measuring,
        "calc-time": 1500,
        "calc-time-unit": "millisecond",
    }


async def test_commands_of_old_releases(monitor: Monitor, control: FakeControl) -> None:
    def parameter(name: str) -> object:
        return control.options.parameters[name]

    for speed, stored in ((1000000, 1000000), (-5, 0), (1 << 62, 1 << 62)):
        assert await ask(monitor, "migrate_set_speed", value=speed) == {}
        assert parameter("max-bandwidth") == stored
    for seconds, stored in ((0.5, 500), (2, 2000), (-1, 0), (1e9, 2000000)):
        assert await ask(monitor, "migrate_set_downtime", value=seconds) == {}
        assert parameter("downtime-limit") == stored
    assert control.calls == [("parameters_changed",)] * 7
    assert await ask(monitor, "migrate-set-cache-size", value=100_000_000) == {}
    assert await ask(monitor, "query-migrate-cache-size") == 67108864
    control.machine.ram_bytes = 1 << 20
    assert await ask(monitor, "migrate-set-cache-size", value=2 << 20) == refused(
        "Parameter 'cache size' expects exceeds guest ram size "
    )
    assert await ask(monitor, "migrate-set-cache-size", value=100) == refused(
        "Parameter 'cache size' expects is smaller than page size"
    )
    assert await ask(monitor, "query-migrate-cache-size") == 67108864
    assert await ask(monitor, "query-cpus") == []
    assert {item["name"] for item in await ask(monitor, "query-events")} == set(EVENTS)


@pytest.mark.parametrize(
    ("instance", "text"),
    [
        ({"type": "chardev"}, "Parameter 'instances[0].id' is missing"),
        (
            {"type": "chardev", "id": 1},
            "Invalid parameter type for 'instances[0].id', expected: string",
        ),
        ({"type": "chardev", "id": "x", "zz": 1}, "Parameter 'instances[0].zz' is unexpected"),
        ({"type": 1}, "Invalid parameter type for 'instances[0].type', expected: string"),
        ({}, "Parameter 'instances[0].type' is missing"),
        (3, "Invalid parameter type for 'instances[0]', expected: object"),
    ],
)
async def test_a_union_in_a_list(monitor: Monitor, instance: object, text: str) -> None:
    assert await ask(monitor, "yank", instances=[instance]) == refused(text)

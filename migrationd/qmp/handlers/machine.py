"""The machine around a guest that does not execute.

It has no vCPUs, block devices, network cards, displays or memory devices, and each
command answers as a QEMU that has none: with an empty list or with the error of a
device that is not there.
"""

import os

from migrationd.errors import QMPError
from migrationd.objects.iothread import IoThread
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.models import machine as models
from migrationd.qmp.models.base import QapiModel

_ARM_MACHINES = ("virt", "sbsa-ref", "raspi", "xlnx-")
_X86_MACHINES = ("pc", "microvm", "isapc", "xenfv", "xenpv", "x-remote")


def query_target(call: Invocation, _: object) -> models.TargetInfo:
    """``query-target``: of the guest's machine type, without one the host's."""
    machine = call.control.machine.type_name or ""
    if machine.startswith(_ARM_MACHINES):
        return models.TargetInfo.make(arch="aarch64")
    if machine.startswith(_X86_MACHINES):
        return models.TargetInfo.make(arch="x86_64")
    return models.TargetInfo.make(arch=os.uname().machine)


def query_current_machine(call: Invocation, _: object) -> models.CurrentMachineParams:
    """``query-current-machine``: nothing is woken up here."""
    return models.CurrentMachineParams.make(wakeup_suspend_support=False)


def query_memory_size(call: Invocation, _: object) -> models.MemorySizes:
    """``query-memory-size-summary``."""
    return models.MemorySizes.make(
        base_memory=call.control.machine.base_memory_bytes, plugged_memory=0
    )


def query_chardev(call: Invocation, _: object) -> list[models.ChardevInfo]:
    """``query-chardev``: the monitors."""
    return [
        models.ChardevInfo.make(
            label=label,
            filename=("" if chardev.is_connected else "disconnected:") + chardev.filename,
            frontend_open=True,
        )
        for label, chardev in call.control.machine.chardevs().items()
    ]


def query_vnc(call: Invocation, _: object) -> models.VncInfo:
    """``query-vnc``."""
    return models.VncInfo.make(enabled=False)


def query_spice(call: Invocation, _: object) -> models.SpiceInfo:
    """``query-spice``."""
    return models.SpiceInfo.make(enabled=False, migrated=False, mouse_mode="client")


def query_replay(call: Invocation, _: object) -> models.ReplayInfo:
    """``query-replay``."""
    return models.ReplayInfo.make(mode="none", icount=0)


def query_dump(call: Invocation, _: object) -> models.DumpQueryResult:
    """``query-dump``."""
    return models.DumpQueryResult.make(status="none", completed=0, total=0)


def nothing_of_the_kind(call: Invocation, _: object) -> list[QapiModel]:
    """A list of what the machine does not have."""
    return []


def query_rx_filter(call: Invocation, arguments: models.QueryRxFilter) -> list[models.RxFilterInfo]:
    """``query-rx-filter``."""
    if "name" in arguments.model_fields_set:
        raise QMPError(f"invalid net client name: {arguments.name}")
    return []


def query_memdev(call: Invocation, _: object) -> list[models.Memdev]:
    """``query-memdev``: the main memory of the guest."""
    return [
        models.Memdev.make(
            id=item.name,
            size=item.size_bytes,
            merge=False,
            dump=True,
            prealloc=False,
            share=item.is_shared,
            reserve=False,
            host_nodes=[],
            policy="default",
        )
        for item in call.control.machine.memory
    ]


def query_iothreads(call: Invocation, _: object) -> list[models.IOThreadInfo]:
    """``query-iothreads``."""
    objects = call.control.objects
    threads = ((name, objects.find(name)) for name in objects)
    return [
        models.IOThreadInfo.make(
            id=name,
            thread_id=found.thread_id,
            poll_max_ns=found.number("poll-max-ns", 32768),
            poll_grow=found.number("poll-grow", 2),
            poll_shrink=found.number("poll-shrink", 2),
            poll_weight=found.number("poll-weight", 3),
            aio_max_batch=found.number("aio-max-batch", 0),
        )
        for name, found in threads
        if isinstance(found, IoThread)
    ]


def no_hotplug(call: Invocation, _: object) -> None:
    """``query-hotpluggable-cpus``."""
    raise QMPError("machine does not support hot-plugging CPUs")


def no_acpi(call: Invocation, _: object) -> None:
    """``query-acpi-ospm-status``."""
    raise QMPError("command is not supported, missing ACPI device")


def query_sev(call: Invocation, _: object) -> models.SevGuest:
    """``query-sev``: no memory is encrypted."""
    return models.SevGuest.make(
        enabled=False,
        api_major=0,
        api_minor=0,
        build_id=0,
        state="uninit",
        sev_type="sev",
        policy=0,
        handle=0,
    )


def no_gic(call: Invocation, _: object) -> None:
    """``query-gic-capabilities``."""
    raise QMPError("GIC hardware is not available on this target")


def query_dump_formats(call: Invocation, _: object) -> models.DumpGuestMemoryCapability:
    """``query-dump-guest-memory-capability``: memory is not dumped."""
    return models.DumpGuestMemoryCapability.make(formats=[])


def no_cpu_model(call: Invocation, arguments: models.CpuModelExpansion) -> None:
    """``query-cpu-model-expansion``: none is known."""
    raise QMPError(f"CPU model '{arguments.model.name}' not found")


def no_balloon(call: Invocation, _: object) -> None:
    """``balloon`` and ``query-balloon``."""
    raise QMPError("No balloon device has been activated", "DeviceNotActive")


def device_add(call: Invocation, arguments: models.DeviceAdd) -> None:
    """``device_add``: no device model is known."""
    if call.control.machine.is_migrating:
        raise QMPError("device_add not allowed while migrating")
    raise QMPError(f"'{arguments.driver}' is not a valid device model name")


def device_del(call: Invocation, arguments: models.DeviceDel) -> None:
    """``device_del``."""
    raise QMPError(f"Device '{arguments.id}' not found", "DeviceNotFound")


def set_link(call: Invocation, arguments: models.SetLink) -> None:
    """``set_link``."""
    raise QMPError(f"Device '{arguments.name}' not found", "DeviceNotFound")


def accepted(call: Invocation, _: object) -> None:
    """Taken, without effect on a guest that does not execute."""


def announce_self(call: Invocation, arguments: models.AnnounceSelf) -> None:
    """``announce-self``: a guest without network cards has nothing to announce."""


def client_migrate_info(call: Invocation, arguments: models.ClientMigrateInfo) -> None:
    """``client_migrate_info``."""
    if arguments.protocol != "spice":
        raise QMPError("Parameter 'protocol' expects 'spice'")
    raise QMPError("SPICE is not in use", "DeviceNotActive")


async def system_reset(call: Invocation, _: object) -> None:
    """``system_reset``."""
    await call.control.machine.reset()


async def system_powerdown(call: Invocation, _: object) -> None:
    """``system_powerdown``."""
    await call.control.machine.powerdown()


def system_wakeup(call: Invocation, _: object) -> None:
    """``system_wakeup``."""
    raise QMPError("wake-up from suspend is not supported by this guest")


def inject_nmi(call: Invocation, _: object) -> None:
    """``inject-nmi``."""
    raise QMPError("machine does not provide NMIs")


def exit_preconfig(call: Invocation, _: object) -> None:
    """``x-exit-preconfig``."""
    raise QMPError("The command is permitted only before machine initialization")


COMMANDS: tuple[CommandSpec, ...] = (
    command("query-target", query_target, returns=models.TargetInfo),
    command("query-machines", nothing_of_the_kind, models.QueryMachines, list[models.MachineInfo]),
    command("query-current-machine", query_current_machine, returns=models.CurrentMachineParams),
    command("query-cpus-fast", nothing_of_the_kind, returns=list[models.CpuInfoFast]),
    command("query-hotpluggable-cpus", no_hotplug, returns=list[models.HotpluggableCpu]),
    command("query-cpu-definitions", nothing_of_the_kind, returns=list[models.CpuDefinition]),
    command("query-memdev", query_memdev, returns=list[models.Memdev]),
    command("query-memory-size-summary", query_memory_size, returns=models.MemorySizes),
    command("query-memory-devices", nothing_of_the_kind, returns=list[models.MemoryDevice]),
    command("query-iothreads", query_iothreads, returns=list[models.IOThreadInfo]),
    command("query-acpi-ospm-status", no_acpi, returns=list[models.AcpiOstInfo]),
    command("query-sev", query_sev, returns=models.SevInfo),
    command("query-gic-capabilities", no_gic, returns=list[models.GicCapability]),
    command(
        "query-dump-guest-memory-capability",
        query_dump_formats,
        returns=models.DumpGuestMemoryCapability,
    ),
    command(
        "query-cpu-model-expansion",
        no_cpu_model,
        models.CpuModelExpansion,
        models.CpuModelExpansionInfo,
    ),
    command("query-block", nothing_of_the_kind, models.QueryBlock, list[models.BlockInfo]),
    command(
        "query-blockstats", nothing_of_the_kind, models.QueryBlockStats, list[models.BlockStats]
    ),
    command(
        "query-named-block-nodes", nothing_of_the_kind, models.QueryBlock, list[models.BlockNode]
    ),
    command("query-block-jobs", nothing_of_the_kind, returns=list[models.BlockJobInfo]),
    command("query-block-exports", nothing_of_the_kind, returns=list[models.BlockExportInfo]),
    command("query-chardev", query_chardev, returns=list[models.ChardevInfo]),
    command("query-mice", nothing_of_the_kind, returns=list[models.MouseInfo]),
    command("query-rx-filter", query_rx_filter, models.QueryRxFilter, list[models.RxFilterInfo]),
    command("query-tpm", nothing_of_the_kind, returns=list[models.TpmInfo]),
    command("query-tpm-models", nothing_of_the_kind, returns=list[models.TpmModel]),
    command("query-tpm-types", nothing_of_the_kind, returns=list[models.TpmType]),
    command("query-vnc", query_vnc, returns=models.VncInfo),
    command("query-spice", query_spice, returns=models.SpiceInfo),
    command("query-replay", query_replay, returns=models.ReplayInfo),
    command("query-dump", query_dump, returns=models.DumpQueryResult),
    command("query-balloon", no_balloon, returns=models.BalloonInfo),
    command("balloon", no_balloon, models.BalloonValue),
    command("device_add", device_add, models.DeviceAdd, features=("json-cli", "json-cli-hotplug")),
    command("device_del", device_del, models.DeviceDel),
    command("set_link", set_link, models.SetLink),
    command("set-action", accepted, models.SetAction),
    command("watchdog-set-action", accepted, models.WatchdogSetAction),
    command("rtc-reset-reinjection", accepted),
    command("inject-nmi", inject_nmi),
    command("announce-self", announce_self, models.AnnounceSelf),
    command("client_migrate_info", client_migrate_info, models.ClientMigrateInfo),
    command("system_reset", system_reset),
    command("system_powerdown", system_powerdown),
    command("system_wakeup", system_wakeup),
    command("x-exit-preconfig", exit_preconfig, features=("unstable",)),
)

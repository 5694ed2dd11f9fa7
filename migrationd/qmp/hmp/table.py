"""The human commands: their words, their help, and what they do.

Each is done by QMP commands; one whose QMP command is not there does not exist.

Reference: names, arguments and texts of QEMU 11.1.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from migrationd.objects.option import parse_object
from migrationd.qmp.context import GuestSnapshots
from migrationd.qmp.hmp import layout
from migrationd.qmp.hmp.arguments import Argument, flag, integer, rest, switch, word
from migrationd.qmp.hmp.errors import PlainError
from migrationd.qmp.hmp.parameters import parse_parameter

Values = Mapping[str, Any]


class Qmp(Protocol):
    """What human commands are done with."""

    @property
    def only_migratable(self) -> bool:
        """Whether the process was started so."""

    @property
    def snapshots(self) -> GuestSnapshots:
        """Saved states of the guest."""

    def has(self, name: str) -> bool:
        """Whether there is such a QMP command."""

    def accepts(self, name: str, member: str, value: str) -> bool:
        """Whether an enumeration has a value."""

    async def perform(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401
        """Perform a QMP command; its return as a JSON value.

        Raises:
            MigrationdError: It failed.
        """


@dataclass(frozen=True, slots=True)
class HumanCommand:
    """One command.

    Attributes:
        names: With aliases, as ``help`` shows them: ``stop|s``.
        arguments: What follows it.
        shown: The arguments in ``help``.
        help: What it does, in a line or more.
        needs: The QMP command that does it.
        run: Does it; the text to print.
    """

    names: str
    arguments: tuple[Argument, ...]
    shown: str
    help: str
    needs: str
    run: Callable[[Qmp, Values], Awaitable[str]]

    def is_called(self, name: str) -> bool:
        """Whether this is one of its names."""
        return name in self.names.split("|")


def _plain(
    names: str,
    needs: str,
    help_: str,
    *arguments: Argument,
    shown: str = "",
    fixed: Values | None = None,
) -> HumanCommand:
    """A command that hands its values to one QMP command and prints nothing."""

    async def run(qmp: Qmp, values: Values) -> str:
        await qmp.perform(needs, {**(fixed or {}), **values})
        return ""

    return HumanCommand(names, arguments, shown, help_, needs, run)


def _info(name: str, needs: str, help_: str, show: Callable[[Any], str]) -> HumanCommand:
    """A command that prints what one QMP command returns."""

    async def run(qmp: Qmp, values: Values) -> str:
        return show(await qmp.perform(needs))

    return HumanCommand(name, (), "", help_, needs, run)


async def _migrate(qmp: Qmp, values: Values) -> str:
    # Also without -d: there is no terminal that could wait.
    arguments = {"uri": values["uri"]} | ({"resume": True} if values["resume"] else {})
    await qmp.perform("migrate", arguments)
    return ""


async def _migrate_continue(qmp: Qmp, values: Values) -> str:
    if not qmp.accepts("migrate-continue", "state", values["state"]):
        raise PlainError(f"invalid parameter value: {values['state']}")
    await qmp.perform("migrate-continue", values)
    return ""


async def _set_capability(qmp: Qmp, values: Values) -> str:
    states = await qmp.perform("query-migrate-capabilities")
    if values["capability"] not in (item["capability"] for item in states):
        raise PlainError(f"invalid parameter value: {values['capability']}")
    await qmp.perform("migrate-set-capabilities", {"capabilities": [values]})
    return ""


async def _set_parameter(qmp: Qmp, values: Values) -> str:
    name = values["parameter"]
    await qmp.perform("migrate-set-parameters", {name: parse_parameter(name, values["value"])})
    return ""


async def _object_add(qmp: Qmp, values: Values) -> str:
    qom_type, object_id, properties = parse_object(values["object"])
    await qmp.perform("object-add", {"qom-type": qom_type, "id": object_id, **properties})
    return ""


async def _announce(qmp: Qmp, values: Values) -> str:
    parameters = await qmp.perform("query-migrate-parameters")
    arguments: dict[str, object] = {
        name: parameters[f"announce-{name}"] for name in ("initial", "max", "rounds", "step")
    }
    if "interfaces" in values:
        arguments["interfaces"] = values["interfaces"].split(",")
    if "id" in values:
        arguments["id"] = values["id"]
    await qmp.perform("announce-self", arguments)
    return ""


async def _calc_dirty_rate(qmp: Qmp, values: Values) -> str:
    if not values["second"]:
        raise PlainError("Incorrect period length specified!\n")
    if values["dirty-ring"] and values["dirty-bitmap"]:
        raise PlainError("Either dirty ring or dirty bitmap can be specified!\n")
    mode = "page-sampling"
    if values["dirty-ring"] or values["dirty-bitmap"]:
        mode = "dirty-ring" if values["dirty-ring"] else "dirty-bitmap"
    arguments: dict[str, object] = {"calc-time": values["second"], "mode": mode}
    if "sample-pages" in values:
        arguments["sample-pages"] = values["sample-pages"]
    await qmp.perform("calc-dirty-rate", arguments)
    return (
        f"Starting dirty rate measurement with period {values['second']} seconds\n"
        "[Please use 'info dirty_rate' to check results]\n"
    )


def _dirty_limit(name: str) -> Callable[[Qmp, Values], Awaitable[str]]:
    async def run(qmp: Qmp, values: Values) -> str:
        await qmp.perform(name, values)
        return "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]\n"

    return run


async def _info_migrate(qmp: Qmp, values: Values) -> str:
    info = await qmp.perform("query-migrate")
    return layout.migration(info, show_all=values["all"], only_migratable=qmp.only_migratable)


async def _info_name(qmp: Qmp, _: Values) -> str:
    name = (await qmp.perform("query-name")).get("name")
    return f"{name}\n" if name is not None else ""


def _saved_states(qmp: Qmp) -> GuestSnapshots:
    if not qmp.snapshots.nodes:
        raise PlainError("no block device can store vmstate for snapshot")
    return qmp.snapshots


async def _has_tag(snapshots: GuestSnapshots, tag: str) -> bool:
    return tag in [state.tag for state in await snapshots.list()]


async def _savevm(qmp: Qmp, values: Values) -> str:
    snapshots = _saved_states(qmp)
    tag = values.get("tag") or f"{datetime.now():vm-%Y%m%d%H%M%S}"
    if await _has_tag(snapshots, tag):
        await snapshots.delete(tag)  # the new one takes its place, as in QEMU
    await snapshots.save(tag)
    return ""


async def _loadvm(qmp: Qmp, values: Values) -> str:
    snapshots, tag = _saved_states(qmp), values["tag"]
    if not await _has_tag(snapshots, tag):
        raise PlainError(f"Snapshot '{tag}' does not exist in one or more devices")
    await snapshots.load(tag)
    return ""


async def _delvm(qmp: Qmp, values: Values) -> str:
    if qmp.snapshots.nodes:
        await qmp.snapshots.delete(values["tag"])
    return ""


async def _info_snapshots(qmp: Qmp, _: Values) -> str:
    return layout.snapshots(await _saved_states(qmp).list())


async def _cpu(_: Qmp, values: Values) -> str:
    if values["index"]:
        raise PlainError("invalid CPU index\n")
    return ""


_INDENT = "\n\t\t\t "

COMMANDS: tuple[HumanCommand, ...] = (
    HumanCommand("announce_self", (word("interfaces", optional=True), word("id", optional=True)),
                 "[interfaces] [id]", "tell the network where the guest is", "announce-self",
                 _announce),
    HumanCommand("calc_dirty_rate",
                 (flag("r", "dirty-ring"), flag("b", "dirty-bitmap"), integer("second"),
                  integer("sample-pages", optional=True)),
                 "[-r] [-b] second [sample_pages_per_GB]",
                 "measure how fast the guest dirties its memory"
                 f"{_INDENT}-r by the dirty ring, -b by the dirty bitmap",
                 "calc-dirty-rate", _calc_dirty_rate),
    HumanCommand("cancel_vcpu_dirty_limit", (integer("cpu-index", optional=True),), "[cpu_index]",
                 "lift the limit on dirtied memory", "cancel-vcpu-dirty-limit",
                 _dirty_limit("cancel-vcpu-dirty-limit")),
    _plain("client_migrate_info", "client_migrate_info", "tell a remote display where to go",
           word("protocol"), word("hostname"), integer("port", optional=True),
           integer("tls-port", optional=True), word("cert-subject", optional=True),
           shown="protocol hostname port tls-port cert-subject"),
    _plain("closefd", "closefd", "close a descriptor that was passed", word("fdname"),
           shown="closefd name"),
    _plain("cont|c", "cont", "let the guest run"),
    HumanCommand("cpu", (integer("index"),), "index",
                 "choose a CPU for commands that show one: there is none beside the first",
                 "human-monitor-command", _cpu),
    HumanCommand("delvm", (word("tag"),), "tag", "remove a saved state", "snapshot-delete", _delvm),
    _plain("getfd", "getfd", "name a descriptor that was passed", word("fdname"),
           shown="getfd name"),
    HumanCommand("loadvm", (word("tag"),), "tag", "take up a saved state", "snapshot-load",
                 _loadvm),
    HumanCommand("migrate", (flag("d", "detach"), flag("r", "resume"), word("uri")),
                 "[-d] [-r] uri",
                 "migrate to URI (using -d to not wait for completion)"
                 f"{_INDENT}-r to resume a paused postcopy migration",
                 "migrate", _migrate),
    _plain("migrate_cancel", "migrate_cancel", "cancel the migration"),
    HumanCommand("migrate_continue", (word("state"),), "state",
                 "go on with a migration that paused itself in this state", "migrate-continue",
                 _migrate_continue),
    _plain("migrate_incoming", "migrate-incoming", "take a guest in after -incoming defer",
           word("uri"), shown="uri", fixed={"exit-on-error": False}),
    _plain("migrate_pause", "migrate-pause", "pause a migration (postcopy only)"),
    _plain("migrate_recover", "migrate-recover", "go on with a paused incoming postcopy",
           word("uri"), shown="uri"),
    HumanCommand("migrate_set_capability", (word("capability"), switch("state")),
                 "capability state", "switch a capability on or off", "migrate-set-capabilities",
                 _set_capability),
    HumanCommand("migrate_set_parameter", (word("parameter"), rest("value")), "parameter value",
                 "change a parameter", "migrate-set-parameters", _set_parameter),
    _plain("migrate_start_postcopy", "migrate-start-postcopy",
           "let a running migration go on as postcopy"),
    HumanCommand("object_add", (rest("object"),), "[qom-type=]type,id=str[,prop=value][,...]",
                 "make an object", "object-add", _object_add),
    _plain("object_del", "object-del", "remove an object", word("id"), shown="id"),
    _plain("quit|q", "quit", "end the process"),
    HumanCommand("savevm", (word("tag", optional=True),), "tag",
                 "save the guest; without a tag under one that tells the time", "snapshot-save",
                 _savevm),
    HumanCommand("set_vcpu_dirty_limit",
                 (integer("dirty-rate"), integer("cpu-index", optional=True)),
                 "dirty_rate [cpu_index]", "limit how fast the guest dirties its memory",
                 "set-vcpu-dirty-limit", _dirty_limit("set-vcpu-dirty-limit")),
    _plain("stop|s", "stop", "stop the guest"),
    _plain("system_powerdown", "system_powerdown", "ask the guest to power down"),
    _plain("system_reset", "system_reset", "reset the guest"),
    _plain("system_wakeup", "system_wakeup", "wake the guest up"),
    _plain("x_colo_lost_heartbeat", "x-colo-lost-heartbeat", "say that the other side is lost"),
)  # fmt: skip

INFO: tuple[HumanCommand, ...] = (
    _info("chardev", "query-chardev", "show character devices", layout.character_devices),
    _info("dirty_rate", "query-dirty-rate", "show the measured dirty rate", layout.dirty_rate),
    _info("iothreads", "query-iothreads", "show threads for devices", layout.iothreads),
    _info("kvm", "query-kvm", "show whether KVM is used", layout.kvm),
    HumanCommand("migrate", (flag("a", "all"),), "[-a]",
                 "show migration status (-a: all, dump all status)", "query-migrate",
                 _info_migrate),
    _info("migrate_capabilities", "query-migrate-capabilities", "show capabilities",
          layout.capabilities),
    _info("migrate_parameters", "query-migrate-parameters", "show parameters",
          layout.parameters),
    HumanCommand("name", (), "", "show the guest's name", "query-name", _info_name),
    HumanCommand("snapshots", (), "", "show saved states", "snapshot-save", _info_snapshots),
    _info("status", "query-status", "show whether the guest runs", layout.status),
    _info("uuid", "query-uuid", "show the guest's UUID", lambda info: f"{info['UUID']}\n"),
    _info("vcpu_dirty_limit", "query-vcpu-dirty-limit", "show limits on dirtied memory",
          layout.vcpu_dirty_limits),
    _info("version", "query-version", "show the version", layout.version),
)  # fmt: skip

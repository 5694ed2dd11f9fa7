"""Run state, identity, descriptors and the protocol itself."""

from typing import Literal

from pydantic import Field

from migrationd.qmp.models.base import Facts, QapiModel, optional

RunState = Literal[
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
]


class Empty(QapiModel):
    """No arguments, or nothing to return."""


class QmpCapabilities(QapiModel):
    """Arguments of ``qmp_capabilities``."""

    enable: list[Literal["oob"]] = Field(default=[], json_schema_extra=Facts({"since": "2.12"}))


class StatusInfo(QapiModel):
    """Return of ``query-status``."""

    running: bool
    status: RunState


class NameInfo(QapiModel):
    """Return of ``query-name``."""

    name: str = optional()


class UuidInfo(QapiModel):
    """Return of ``query-uuid``."""

    UUID: str


class VersionTriple(QapiModel):
    """A version number."""

    major: int
    minor: int
    micro: int


class VersionInfo(QapiModel):
    """Return of ``query-version``."""

    qemu: VersionTriple
    package: str


class CommandInfo(QapiModel):
    """One entry of ``query-commands``."""

    name: str


class KvmInfo(QapiModel):
    """Return of ``query-kvm``."""

    enabled: bool
    present: bool


class FdName(QapiModel):
    """Arguments of ``getfd`` and ``closefd``."""

    fdname: str


ShutdownCause = Literal[
    "none",
    "host-error",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-signal",
    "host-ui",
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
    "subsystem-reset",
    "snapshot-load",
]


class ShutdownEvent(QapiModel):
    """Data of the SHUTDOWN and RESET events."""

    guest: bool
    reason: ShutdownCause


class HumanMonitorCommand(QapiModel):
    """Arguments of ``human-monitor-command``."""

    command_line: str
    cpu_index: int = optional()

"""Which transports can carry what is switched on.

Reference: QEMU's check of ``migrate`` and ``migrate-incoming`` before anything is opened,
its order and its texts.
"""

from collections.abc import Mapping

from migrationd.errors import QMPError
from migrationd.migration.parameters import Value
from migrationd.transport.address import Address, ExecAddress, FdAddress, FileAddress, RdmaAddress

_SINGLE = (ExecAddress, FdAddress, RdmaAddress)


def check_transport(
    address: Address, capabilities: Mapping[str, bool], parameters: Mapping[str, Value]
) -> None:
    """Check an address against the settings.

    Args:
        address: Of the main connection.
        capabilities: Every capability.
        parameters: Every parameter.

    Raises:
        QMPError: The transport cannot carry it.
    """
    is_file = isinstance(address, FileAddress)
    if capabilities["mapped-ram"] and not is_file:
        raise QMPError("Migration requires seekable transport (e.g. file)")
    if capabilities["multifd"] or capabilities["postcopy-preempt"]:
        is_single = isinstance(address, _SINGLE) or (is_file and not capabilities["mapped-ram"])
        if is_single:
            raise QMPError("Migration requires multi-channel URIs (e.g. tcp)")
    if parameters["mode"] == "cpr-transfer" and is_file:
        raise QMPError("Migration requires streamable transport (eg unix)")
    if capabilities["mapped-ram"] and parameters["tls-creds"]:
        raise QMPError("Cannot use TLS with mapped-ram")


def check_mode(capabilities: Mapping[str, bool], parameters: Mapping[str, Value]) -> None:
    """Check what an outgoing migration in another than the normal mode cannot be.

    Args:
        capabilities: Every capability.
        parameters: Every parameter.

    Raises:
        QMPError: The mode does not go with what is on.
    """
    mode = parameters["mode"]
    if mode == "normal":
        return
    for name, what in (
        ("postcopy-ram", "postcopy"),
        ("dirty-bitmaps", "postcopy"),
        ("background-snapshot", "background snapshot"),
        ("x-colo", "COLO"),
    ):
        if capabilities[name]:
            raise QMPError(f"Cannot use {what} with CPR")
    if mode == "cpr-exec":
        if not parameters["cpr-exec-command"]:
            raise QMPError("cpr-exec mode requires setting cpr-exec-command")
        raise QMPError(
            "cpr-exec replaces the process that executes the guest, and migrationd is none; "
            "use cpr-transfer"
        )
